"""The store: what is appended stays, whatever stops a writer, and old files are read."""

import json
import multiprocessing

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dhrd_lib.config import WorkbenchError
from dhrd_lib.rationales import RationaleStore, Record


def record(rationale: str = "It burst.", **fields) -> Record:
    values = {"idx": "0", "prompt_hash": "h", "teacher": "t", "parameters": {"protocol": "gold"}}
    return Record(**{**values, "rationale": rationale, **fields})


RECORDS = st.builds(
    record,
    rationale=st.text(),
    idx=st.text(),
    parameters=st.dictionaries(st.text(), st.none() | st.integers(-9, 9) | st.text() | st.booleans()),
    agreed=st.none() | st.booleans(),
    review=st.none() | st.just("edit"),
    original=st.none() | st.text(),
)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(RECORDS, max_size=4))
def test_records_come_back_as_appended(tmp_path_factory, records):
    store = RationaleStore(tmp_path_factory.mktemp("store") / "deep" / "store.jsonl")
    for each in records:
        store.append(each)
    assert store.read() == records


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


@pytest.mark.filterwarnings("error")
def test_last_line_without_newline_is_kept(tmp_path):
    store = RationaleStore(tmp_path / "store.jsonl")
    store.path.write_text(record().model_dump_json())
    store.append(record(idx="1"))
    assert [each.idx for each in store.read()] == ["0", "1"]


def test_old_store_is_read(tmp_path):
    """Lines of version 0.1.0: with spaces, the data's own rationales, an address with a slash at its end."""
    old = {"idx": "0", "prompt_hash": "h", "teacher": "human", "rationale": "é", "seconds": 0}
    parameters = [{"protocol": "human"}, {"server": "http://a/v1/", "temperature": 1}]
    store = RationaleStore(tmp_path / "store.jsonl")
    store.path.write_text("\n".join(json.dumps({**old, "parameters": of}) for of in parameters))
    human, served = store.read()
    assert (human.rationale, human.parameters, human.agreed) == ("é", {"protocol": "human"}, None)
    assert served.key == served.model_copy(update={"parameters": {"server": "http://a/v1", "temperature": 1.0}}).key


def add_many(path, writer, count):
    for i in range(count):
        RationaleStore(path).append(record("x" * 3000, idx=f"{writer}-{i}"))


def test_processes_append_without_loss(tmp_path):
    context, path = multiprocessing.get_context("forkserver"), tmp_path / "store.jsonl"
    writers = [context.Process(target=add_many, args=(path, writer, 40), daemon=True) for writer in range(3)]
    for process in writers:
        process.start()
    for process in writers:
        process.join(60)
        assert process.exitcode == 0
    found = [each.idx for each in RationaleStore(path).read()]
    assert sorted(found) == sorted(f"{writer}-{i}" for writer in range(3) for i in range(40))


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
