"""Filters, the report, and the panel where a person reviews rationales."""

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from dhrd_lib.rationales import Record, TeacherConfig, flags, names_label, quality_report, select, store_for
from dhrd_lib.rationales.generate import blank_records
from dhrd_lib.tasks import load_task
from dhrd_lib.widgets import ReviewPanel


def record(rationale: str = "It burst.", **fields) -> Record:
    values = {"idx": "0", "prompt_hash": "h", "teacher": "t", "parameters": {"protocol": "gold"}, "agreed": True}
    return Record(**{**values, "rationale": rationale, **fields})


def split(rationales: list[str | None]) -> Dataset:
    """Return a split with the columns that `load_task` gives, of the labels fix, refund, explain in turn."""
    strings, n = dict.fromkeys(("text", "idx", "input_text", "rationale"), Value("string")), len(rationales)
    columns = {
        "text": [f"text {i}" for i in range(n)],
        "idx": [str(i) for i in range(n)],
        "input_text": [f"Customer: text {i}\nWhat must happen next?" for i in range(n)],
        "rationale": rationales,
        "label": [i % 3 for i in range(n)],
    }
    labels = ClassLabel(names=["fix", "refund", "explain"])
    return Dataset.from_dict(columns, features=Features({**strings, "label": labels}))


FORMS = {  # label: texts that name it, and texts that do not
    "refund": (["Give a refund.", "It was Refunded, twice.", "これはrefundについて"], ["The money goes back."]),
    "entailment": (["That entails it."], ["The tail is long."]),
    "contradiction": (["a contradictory claim"], []),
    "explain": (["An explained fee"], ["a plain fee"]),
    "fix": (["Fixing it"], ["the fixture", "prefix", ""]),
    "replace": (["Replacements are sent"], ["a place"]),
    "not entailment": (["It is not entailed"], ["It is entailed"]),
    "the first": (["the first one"], ["first of all"]),
    "card_arrival": (["a card arrival problem"], ["the card"]),
    # Common words, numbers and letters count as an answer alone.
    "no": (
        ["No, it isn't", "The answer must be no because it rained.", 'That makes it a "no" here.', "So it is no."],
        ["Nobody knows; another note", "There is no fee, and he has no receipt.", "No customer asked."],
    ),
    "yes": (["Yes!"], ["yesterday"]),
    "1": (["The label is 1."], ["He has 1 lamp."]),
    "A": (['It is "A".'], ["A lamp broke."]),
    "否": (["所以，答案为：否"], ["是否损坏尚不清楚。"]),
    "いいえ": (["いいえ、壊れていない。"], []),
    # Scripts that join words.
    "退款": (["客户要求退款，因为商品损坏。"], ["客户要求换货。"]),
    "返金": (["返金する必要がある"], []),
    "คืนเงิน": (["ลูกค้าต้องการคืนเงินทันที"], []),
    "استرداد": (["يجب إجراء الاسترداد فورا"], []),
    "환불": (["고객은 환불을 원한다"], []),
    "धनवापसी": (["ग्राहक को धनवापसी चाहिए"], []),
}


@pytest.mark.parametrize("label", FORMS)
def test_label_is_found_in_its_forms(label):
    naming, others = FORMS[label]
    assert [text for text in [*naming, *others] if names_label(text, label)] == naming


INPUT = "Customer: the paint kit burst and dried onto the paper before the course began\nWhat must happen next?"
COPY = "The paint kit burst and dried onto the paper before the course began, so."


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ()),
        ({"agreed": False}, ("disagrees",)),
        ({"agreed": None}, ("no_answer",)),
        ({"rationale": "It is to be replaced."}, ("leaks_label",)),
        ({"finish_reason": "length"}, ("cut_off",)),
        ({"rationale": "hmm\n</think>\n\nA burst kit is no use."}, ("thinking",)),
        ({"tokens_in": 12}, ("prompt_cut",)),
        ({"tokens_in": 30}, ()),
        ({"rationale": " ".join(f"w{i}" for i in range(151))}, ("too_long",)),
        ({"rationale": "The kit burst open. " * 4}, ("repeats",)),
        ({"rationale": "套件破裂了。" * 4}, ("repeats",)),
        ({"rationale": COPY}, ("copies_input",)),
    ],
)
def test_each_filter_flags_its_case_alone(fields, expected):
    one = record(**{"rationale": "A kit that arrives burst is no use to her.", **fields})
    assert flags(one, INPUT, "replace") == expected


@pytest.mark.parametrize("name", ["support_triage", "everyday_nli"])
def test_packaged_rationales_pass_every_filter(name):
    task, data = load_task(name)
    report = quality_report(task, data["train"])
    assert len(report.kept) == len(data["train"])


def test_report_on_the_data_counts_missing_rationales(task):
    report = quality_report(task, split(["Because.", None, "Since."]))
    assert report.kept == {"0": "Because.", "2": "Since."}
    assert report.table().loc["missing", "count"] == 1
    assert report.by_label()["agreed"].isna().all()


def test_report_counts_every_filter_and_row(task):
    records = [
        record("They broke.", idx="0"),
        record("Refunding is owed.", idx="1"),
        None,
        record("They broke.", idx="3", agreed=False),
        record("", idx="4", agreed=None),
        record("They broke.", idx="5", finish_reason="length"),
        record("A fix is due.", idx="6", review="accept", original="A fix is due."),
        record("They broke.", idx="7", review="reject", original="They broke."),
        record("Because of an explanation and a refund.", idx="8"),
    ]
    report = quality_report(task, split(["x"] * 9), records)
    table = report.table()["count"]
    counts = {"rows": 9, "missing": 1, "rationales": 8, "disagrees": 1, "no_answer": 1, "leaks_label": 2}
    counts |= {"cut_off": 1, "kept": 3}
    assert {name: count for name, count in table.items() if count} == counts
    assert set(report.kept) == {"0", "6", "8"}
    assert report.table()["share"]["leaks_label"] == 2 / 8
    by_label = report.by_label()
    assert by_label.loc["fix", "agreed"] == by_label.loc["refund", "agreed"] == pytest.approx(2 / 3)
    assert by_label["rationales"].sum() == 8
    assert report.rows["words"].max() == 7


CONFIG = TeacherConfig(model="m", prompt="{input} {label}")


def reviewed(task, folder, rationales):
    """Return a split whose rationales a teacher has stored, the store, and the panel."""
    data, store = split(rationales), store_for(task, CONFIG, folder)
    for blank, text in zip(blank_records(task, data, CONFIG)[0], rationales, strict=True):
        store.append(blank.model_copy(update={"rationale": text, "agreed": True}))
    return data, store, ReviewPanel(task, data, CONFIG, folder)


def test_panel_pages_shows_flags_and_stores_verdicts(task, tmp_path):
    texts = ["They broke <script>.", "Refunding is owed.", "Nothing is wrong.", "They broke again."]
    data, store, panel = reviewed(task, tmp_path, texts)

    def click(name: str) -> None:
        panel.buttons[name].click()

    assert "1 of 4" in panel.row.value
    assert panel.words.value == texts[0]
    click("Next")
    assert "leaks_label" in panel.row.value
    click("Reject")
    click("Next")
    panel.words.value = "All is <well>."
    click("Accept")
    assert "The teacher&#x27;s text" in panel.row.value
    click("Next")
    panel.words.value = ""
    click("Save the edit")
    assert "empty" in panel.message.value
    click("Previous")
    assert "3 of 4" in panel.row.value
    panel.choice.value = "not reviewed"
    assert "1 of 2" in panel.row.value
    panel.choice.value = "flagged"
    assert "1 of 1" in panel.row.value
    verdicts = [(one.idx, one.review, one.rationale) for one in store.read()[4:]]
    assert verdicts == [("1", "reject", "Refunding is owed."), ("2", "edit", "All is <well>.")]
    assert set(quality_report(task, data, select(task, data, CONFIG, tmp_path)).kept) == {"0", "2", "3"}


def test_panel_escapes_a_rows_text(task, tmp_path):
    _, _, panel = reviewed(task, tmp_path, ["<script>alert(1)</script>"])
    panel.words.value = "Fine."
    panel.buttons["Save the edit"].click()
    assert "&lt;script&gt;" in panel.row.value
    assert "<script>" not in panel.row.value


def test_panel_without_rationales_has_nothing_to_judge(task, tmp_path):
    panel = ReviewPanel(task, split(["a"]), CONFIG, tmp_path)
    assert panel.row.value == "No rationale to show."
    assert panel.buttons["Accept"].disabled
