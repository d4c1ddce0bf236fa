"""The store: what is appended stays, whatever stops a writer, and old files are read."""

import json

import pytest

from dhrd_lib.config import WorkbenchError
from dhrd_lib.rationales import RationaleStore, Record


def record(rationale: str = "It burst.", **fields) -> Record:
    values = {"idx": "0", "prompt_hash": "h", "teacher": "t", "parameters": {"protocol": "gold"}}
    return Record(**{**values, "rationale": rationale, **fields})


def test_store_cut_anywhere_gives_records_before_the_cut(tmp_path):
    store = RationaleStore(tmp_path / "store.jsonl")
    first, second = record("erst é"), record("zweit é\u2028", idx="1")
    store.append(first)
    start = store.path.stat().st_size
    store.append(second)
    whole = store.path.read_bytes()
    for cut in range(start + 2, len(whole)):
        store.path.write_bytes(whole[:cut])
        with pytest.warns(UserWarning, match="line 2 is no record"):
            assert store.read() == [first]
        store.append(second)
        with pytest.warns(UserWarning, match="line 2 is no record"):
            assert store.read() == [first, second]


def test_old_store_is_read(tmp_path):
    """Lines of version 0.1.0: with spaces, the data's own rationales, an address with a slash at its end."""
    old = {"idx": "0", "prompt_hash": "h", "teacher": "human", "rationale": "é", "seconds": 0}
    parameters = [{"protocol": "human"}, {"server": "http://a/v1/", "temperature": 1}]
    store = RationaleStore(tmp_path / "store.jsonl")
    store.path.write_text("\n".join(json.dumps({**old, "parameters": of}) for of in parameters))
    human, served = store.read()
    assert (human.rationale, human.parameters, human.agreed) == ("é", {"protocol": "human"}, None)
    assert served.key == served.model_copy(update={"parameters": {"server": "http://a/v1", "temperature": 1.0}}).key


def test_review_keeps_the_teachers_text(tmp_path):
    store = RationaleStore(tmp_path / "store.jsonl")
    first = record("Refunding is owed.")
    store.append(first)
    edited = store.review(store.review(first, "reject"), "edit", " Money is owed. ")
    assert (edited.rationale, edited.original, edited.review) == ("Money is owed.", "Refunding is owed.", "edit")
    with pytest.raises(WorkbenchError, match="empty"):
        store.review(first, "edit", "  ")
    with pytest.raises(ValueError, match="review"):
        store.review(first, "maybe")
    assert [each.review for each in store.read()] == [None, "reject", "edit"]
    assert store.read()[0] == first
