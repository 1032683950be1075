"""The task `answer` without training: records, windows, spans over several windows, SQuAD's rules, and the threshold of no answer."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.tiny_answers import answer_settings, nested, question, questions
from helpers.tiny_labelled import WORDS, build_model, build_tokenizer, write_rows
from qkit.core.errors import DataError, ModelError, RecipeError
from qkit.core.progress import Progress
from qkit.data import stage as data_stage
from qkit.plugins.example import Question, RowError
from qkit.plugins.resampling import figures
from qkit.plugins.runtime import Encodes
from qkit.recipe.load import from_dict
from qkit.recipe.schema import Data
from qkit.tasks._answering import spans, squad, windows
from qkit.tasks._answering.reading import question_of
from qkit.tasks.answer import TASK

CONTEXT = "The old tower is in Graz. It is  née 1561, in Graz 😀 too."


def record(**changes: Any) -> dict[str, Any]:
    row = {"question": "Where?", "context": CONTEXT, "answers": {"text": ["Graz"], "answer_start": [20]}, **changes}
    return {name: value for name, value in row.items() if value is not ...}


# --- records ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "answers"),
    [
        ({}, (("Graz", 20),)),
        ({"answers": {"text": ["Graz", "in Graz", "Graz"], "answer_start": [20, 17, 20]}}, (("Graz", 20), ("in Graz", 17))),
        ({"answers": [{"text": "Graz", "answer_start": 46}]}, (("Graz", 46),)),
        ({"answers": [{"text": " old ", "answer_start": 3}]}, (("old", 4),)),
        ({"answers": {"text": [], "answer_start": []}}, ()),
        ({"answers": [], "is_impossible": True}, ()),
        ({"answers": ..., "answer": "1561"}, (("1561", 37),)),
        ({"answers": ..., "answer": "Graz", "answer_start": "46"}, (("Graz", 46),)),
        ({"answers": ..., "answer": ["Graz", "old"], "answer_start": [20, 4]}, (("Graz", 20), ("old", 4))),
        ({"answers": ..., "answer": None}, ()),
        ({"answers": ..., "answer": "", "answer_start": "", "is_impossible": ""}, ()),
    ],
)  # fmt: skip
def test_forms_of_answers(changes: dict[str, Any], answers: Any) -> None:
    example = question_of(record(**changes), Data())
    assert (example.question, example.context, example.answers) == ("Where?", CONTEXT, answers)


@pytest.mark.parametrize(
    ("changes", "said", "rule"),
    [
        ({"answers": {"text": ["Graz"], "answer_start": [21]}}, "where the context has 'raz.', but at 20: off by 1", "malformed"),
        ({"answers": {"text": ["Graz"], "answer_start": [18]}}, "but at 20: off by 2", "malformed"),
        ({"answers": {"text": ["Graz"], "answer_start": [0]}}, "but at 20", "malformed"),
        ({"answers": {"text": ["too"], "answer_start": [57]}}, "it counts bytes of UTF-8, and must count characters", "malformed"),
        ({"answers": {"text": ["too"], "answer_start": [54]}}, "it counts units of UTF-16, and must count characters", "malformed"),
        ({"answers": {"text": ["Wien"], "answer_start": [20]}}, "is not in the context, which has 'Graz' at answer_start=20", "malformed"),
        ({"answers": {"text": ["Graz"], "answer_start": [999]}}, "where the context has ''", "malformed"),
        ({"answers": {"text": ["Graz"], "answer_start": [-1]}}, "not a whole number from 0: -1", "malformed"),
        ({"answers": {"text": ["Graz"], "answer_start": [True]}}, "not a whole number from 0: True", "malformed"),
        ({"answers": {"text": ["Graz"], "answer_start": []}}, "has 1 texts and 0 values of answer_start", "malformed"),
        ({"answers": {"text": [7], "answer_start": [1]}}, "not a text, a list of texts", "malformed"),
        ({"answers": [{"text": "Graz"}]}, "an answer without text or answer_start", "malformed"),
        ({"answers": {"text": [" "], "answer_start": [3]}}, "an answer of white space", "empty"),
        ({"answers": ..., "answer": "Wien"}, "the answer 'Wien' is not in the context", "malformed"),
        ({"answers": ...}, "it must have a column for answers: answers, answer", "malformed"),
        ({"is_impossible": True}, "is_impossible is true, but there is an answer: 'Graz'", "malformed"),
        ({"answers": [], "is_impossible": False}, "is_impossible is false, but there is no answer", "malformed"),
        ({"question": " "}, "question is empty", "empty"),
        ({"context": None}, "context is empty", "empty"),
        ({"context": 3}, "context is not a text: 3", "malformed"),
        ({"context": "a\0b"}, "U+0000", "unicode"),
    ],
)  # fmt: skip
def test_bad_records(changes: dict[str, Any], said: str, rule: str) -> None:
    with pytest.raises(RowError) as raised:
        question_of(record(**changes), Data())
    assert said in str(raised.value) and raised.value.rule == rule


def test_columns_of_other_names() -> None:
    section = Data(columns={"question": "q", "answers": "a"}, ignore=("n*",))
    row = {"q": "Where?", "context": CONTEXT, "a": "1561", "note": 1, "title": "t", "other": 2}
    example = question_of(row, section)
    assert (example.question, example.unread, example.ignored) == ("Where?", ("other",), ("n*",))
    with pytest.raises(RowError, match=r"no column 'q' \(data.columns maps question to it\)"):
        question_of(record(), Data(columns={"question": "q"}))
    assert "did you mean 'question'" in TASK.unknown_column(Data(columns={"questions": "q"}), None)  # type: ignore[arg-type]


# --- the stage data ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("bert"), "bert")


class Prepared:
    """What the stage `data` makes of rows, of which the first `held_out` are the test rows."""

    def __init__(self, folder: Path, model: Path, rows: Any, held_out: int = 4, file: Path | None = None, **data: Any):
        source = file or write_rows(folder / "rows.jsonl", rows)
        raw = answer_settings(model, source, held_out, data=data)
        self.recipe = from_dict(raw, (), "the test")
        (folder / "out").mkdir(parents=True)
        self.summary = data_stage.prepare(self.recipe, folder / "out", Progress())
        self.rows = {
            s: pq.read_table(folder / "out" / f"{s}.parquet").to_pylist() for s in ("train", "validation", "test")
        }
        self.ledger = pq.read_table(folder / "out" / "ledger.parquet").to_pylist()
        labels = folder / "out" / "labels.json"
        self.labels: dict[str, Any] = json.loads(labels.read_text()) if labels.exists() else {}

    def check(self, name: str) -> Mapping[str, Any]:
        found: Mapping[str, Any] = next(check for check in self.summary["checks"] if check["name"] == name)
        return found

    def failed(self) -> list[str]:
        return [check["name"] for check in self.summary["checks"] if check["status"] == "fail"]


def test_windows_hold_the_whole_context_and_their_answers(model: Path, tmp_path: Path) -> None:
    """17 tokens with the question and 3 special ones: 14 hold 9 words, the second window 4 of them again."""
    rows = questions(40, unanswered=4)
    done = Prepared(tmp_path, model, rows, max_length=14, stride=4)
    assert not done.failed()
    ids = {word: 4 + number for number, word in enumerate(WORDS)}
    made = [*done.rows["test"], *done.rows["train"]]
    assert len(made) == 80 and [row["window"] for row in made] == [0, 1] * 40
    for place, row in enumerate(made):
        source = rows[place // 2]
        words = source["context"].split()
        part = words[:9] if row["window"] == 0 else words[5:]
        asked = [ids[word] for word in source["question"].split()]
        assert row["input_ids"] == [1, *asked, 2, *[ids[word] for word in part], 2]
        assert row["token_type_ids"] == [0] * 4 + [1] * (len(part) + 1)
        taken = [source["context"][b:e] for b, e in zip(row["begins"], row["ends"], strict=True) if b >= 0]
        assert taken == part and row["begins"][:4] == [-1] * 4 and row["begins"][-1] == -1
        answer = source["answers"]["text"]
        assert (row["names"], row["text"], row["id"]) == (answer, source["question"], source["id"])
        first, last = row["labels"]
        if (first, last) == (0, 0):
            start = source["answers"]["answer_start"][0] if answer else 0
            before, after = len(" ".join(words[:5])) + 1, len(" ".join(words[:9]))
            assert not answer or (start + len(answer[0]) > after if row["window"] == 0 else start < before)
        else:
            assert source["context"][row["begins"][first] : row["ends"][last]] == answer[0]
    assert {row["id"] for row in made if row["labels"] != [0, 0]} == {
        row["id"] for row in rows if row["answers"]["text"]
    }


def test_all_windows_of_a_question_are_counted_and_stay_together(model: Path, tmp_path: Path) -> None:
    rows = [*questions(60), {**questions(60)[-1], "question": "pear bar"}, questions(60)[20]]
    rows[-2]["answers"] = {"text": [], "answer_start": []}
    done = Prepared(
        tmp_path, model, rows, 0, max_length=14, stride=4, test=[], split={"train": 0.6, "validation": 0.2, "test": 0.2}
    )
    splits = done.summary["splits"]
    assert sum(counts["records"] for counts in splits.values()) == 62
    assert sum(counts["kept"] for counts in splits.values()) == 61 and done.check("duplicate")["found"] == 1
    for split, made in done.rows.items():
        assert splits[split]["rows"] == len(made) == 2 * splits[split]["kept"] > 0
        assert splits[split]["labelled_tokens"] == 2 * len(made)
        assert [row["window"] for row in made] == [0, 1] * (len(made) // 2)
    contexts = [{row["pair"] for row in made} for made in done.rows.values()]
    assert not contexts[0] & contexts[1] and not contexts[0] & contexts[2] and not contexts[1] & contexts[2]
    assert {row["status"] for row in done.ledger if row["line"] == 62} == {"dropped"}
    assert {(row["part"], row["labelled_tokens"]) for row in done.ledger} == {(0, 2), (1, 2)}


@pytest.mark.parametrize("whole", [True, False])
def test_files_in_the_layout_of_squad(model: Path, tmp_path: Path, whole: bool) -> None:
    rows = questions(30, unanswered=5)
    content = nested(rows)
    if whole:
        content["data"][0]["paragraphs"][11]["qas"][0]["answers"][0]["answer_start"] += 1
        content["data"].append({"title": "u", "paragraphs": [{"context": "x"}]})
    file = tmp_path / "dev-v2.0.json"
    file.write_text(json.dumps(content, indent=None if whole else 1), encoding="utf-8")
    done = Prepared(tmp_path / "nested", model, None, file=file)
    flat = Prepared(tmp_path / "flat", model, rows)
    assert not flat.failed() and done.failed() == (["malformed"] if whole else [])
    if whole:
        message = done.check("malformed")["message"]
        assert done.check("malformed")["found"] == 2
        assert f"{file}:12 the answer" in message and "off by 1" in message
        assert "article 2, paragraph 1 has no list of questions (qas)" in {row["reason"] for row in done.ledger}
    else:
        kept = [{name: value for name, value in row.items() if name != "place"} for row in done.rows["train"]]
        assert kept == [{name: value for name, value in row.items() if name != "place"} for row in flat.rows["train"]]
    assert flat.labels["names"] == ["start", "end"] and flat.check("unused")["status"] == "pass"
    assert flat.labels["rows"]["train"] == {"answer": 21, "no answer": 5}
    assert flat.check("answers")["message"] == "21 training questions have an answer, 5 have none"


def test_malformed_records_can_be_dropped(model: Path, tmp_path: Path) -> None:
    rows = questions(20)
    rows[10]["answers"]["answer_start"] = [999]
    done = Prepared(tmp_path, model, rows, clean={"malformed": "drop"})
    assert not done.failed() and done.check("malformed")["status"] == "warn"
    assert done.summary["splits"]["train"]["kept"] == 15


@pytest.mark.parametrize(
    ("changes", "data", "check", "said"),
    [
        ({"question": "bar " * 16}, {}, "length", "leaves 1 of data.max_length=20 tokens for the context; windows share 4 (data.stride)"),
        ({"question": "bar " * 30}, {}, "length", "leaves 0 of data.max_length=20"),
        ({"context": "bar " * 40 + "fin"}, {"too_long": "drop"}, "length", "tokens, more than data.max_length=20"),
        ({"answers": {"text": ["all"], "answer_start": [0]}}, {}, "length", "which no window holds whole"),
        ({"answers": ["fin"], "context": "fin bar fin"}, {}, "answer_place", "'fin' several times in its context, and no answer_start"),
        ({"answers": ["in"], "context": "bar fin"}, {}, "answer_tokens", "'in', and its tokens are 'fin'"),
    ],
)  # fmt: skip
def test_odd_questions_are_counted(
    model: Path, tmp_path: Path, changes: dict[str, Any], data: Any, check: str, said: str
) -> None:
    rows = questions(20)
    odd = {**question(100, 30), **changes}
    if changes.get("answers") == {"text": ["all"], "answer_start": [0]}:
        odd["answers"] = {"text": [odd["context"]], "answer_start": [0]}
    elif "answers" not in changes:
        odd["answers"] = {"text": [], "answer_start": []}
    done = Prepared(tmp_path, model, [*rows, odd], **data)
    assert (done.check(check)["status"], done.check(check)["found"]) == ("warn", 1)
    assert said in done.check(check)["message"] and "rows.jsonl:21" in done.check(check)["message"]
    assert done.summary["splits"]["train"]["dropped"] == (check == "length")


def test_sets_without_answers(model: Path, tmp_path: Path) -> None:
    none = [question(i, answered=False) for i in range(20)]
    assert Prepared(tmp_path / "a", model, none).failed() == ["answers"]
    mixed = Prepared(tmp_path / "b", model, [*none[:4], *questions(20)[4:]])
    assert mixed.check("answers")["status"] == "warn" and not mixed.failed()
    assert "4 held-out questions have none, and the model will answer them" in mixed.check("answers")["message"]


def test_a_tokenizer_without_offsets_is_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qkit.tasks._encoder import encoder

    class Slow:
        is_fast = False

    monkeypatch.setattr(encoder, "open_tokenizer", lambda recipe: Slow())
    with pytest.raises(ModelError, match="needs a fast tokenizer"):
        Prepared(tmp_path, model, questions(8))


def test_unknown_columns_are_named(model: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="did you mean 'context'"):
        Prepared(tmp_path, model, questions(8), columns={"contxt": "context"})


@pytest.mark.parametrize(
    ("task", "section", "said"),
    [
        ("answer", {"data": {"stride": 20}}, "data.stride=20: windows of data.max_length=20 tokens cannot share as many; set it to 5"),
        ("answer", {"method": "peft", "peft": {"peft_type": "P_TUNING"}}, "peft.peft_type=P_TUNING puts tokens before the text"),
        ("answer", {"data": {"too_long": "truncate"}}, "data.too_long=truncate is not for task=answer: use split or drop"),
        ("answer", {"loss": {"class_weights": "balanced"}}, "task=answer has places in a text, and no classes"),
        ("answer", {"loss": {"label_smoothing": 0.1}}, "it would favour padding"),
        ("classify", {"data": {"stride": 4}}, "data.stride=4 is for task=answer, and not for task=classify"),
        ("classify", {"data": {"too_long": "split"}}, "data.too_long=split is not for task=classify: use truncate or drop"),
        ("chat", {"evaluate": {"max_answer_tokens": 4}}, "evaluate.max_answer_tokens=4 is for task=answer"),
    ],
)  # fmt: skip
def test_settings_without_a_meaning(model: Path, task: str, section: Any, said: str) -> None:
    data = {"train": [{"source": "rows.jsonl"}], "max_length": 20, **section.pop("data", {})}
    raw = {"task": task, "model": {"source": str(model)}, "data": data, **section}
    with pytest.raises(RecipeError, match=said.replace("(", r"\(")):
        from_dict(raw, (), "the test")


def test_defaults() -> None:
    raw = {"task": "answer", "model": {"source": "owner/x"}, "data": {"train": [{"source": "a.jsonl"}]}}
    recipe = from_dict(raw, (), "the test")
    assert (recipe.data.too_long, recipe.data.max_length, windows.stride_of(recipe.data)) == ("split", 384, 96)
    assert windows.stride_of(Data(max_length=2048)) == 128 and recipe.data.split is not None


# --- windows, by many contexts ----------------------------------------------------------------------------------------


@given(
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=60), st.integers(0, 59), st.integers(1, 6), st.integers(1, 5)
)
def test_every_short_answer_is_in_a_window(words: list[str], place: int, length: int, stride: int) -> None:
    """An answer of no more tokens than two windows share is in one of them; and no token of the context is left out."""
    context, first = " ".join(words), place % len(words)
    text = " ".join(words[first : first + min(length, stride)])
    start = len(" ".join([*words[:first], ""])) if first else 0
    section = Data(max_length=14, stride=stride, too_long="split")
    made = windows.windows(build_tokenizer(), ["ban ben"], [context], section)[0]
    assert isinstance(made, list) and max(len(row.input_ids) for row in made) <= 14
    seen = {b for row in made for b in row.begins if b >= 0}
    assert seen == {i for i in range(len(context)) if context[i] != " " and (not i or context[i - 1] == " ")}
    labelled = [row.with_answer(text, start, row is made[-1]) for row in made]
    taken = [context[row.begins[row.labels[0]] : row.ends[row.labels[1]]] for row in labelled if row.labels != (0, 0)]
    assert taken and set(taken) == {text}


# --- answers ----------------------------------------------------------------------------------------------------------


class Given(Encodes):
    """Gives the logits that it was made with."""

    def __init__(self, logits: Any):
        self.given = [np.array(row, np.float32).T for row in logits]

    def logits(self, rows: Any) -> Any:
        return iter(self.given)

    def memory_bytes(self) -> int:
        return 0


BEGINS, ENDS = (-1, -1, 0, 4, 8, -1), (-1, -1, 3, 7, 14, -1)


def window(
    context: str = "one two  three", number: int = 0, begins: Any = BEGINS, ends: Any = ENDS
) -> windows.ContextRow:
    return windows.ContextRow([1] * len(begins), [], (0, 0), begins, ends, context, number)


@pytest.mark.parametrize(
    ("logits", "longest", "text", "begin"),
    [
        ([[9, 9, 1, 2, 0, 9], [9, 9, 0, 1, 3, 9]], 3, "two  three", 4),  # nothing outside the context
        ([[0, 0, 1, 2, 0, 0], [0, 0, 0, 1, 3, 0]], 1, "two", 4),  # at most one token; "three" is as good, and later
        ([[0, 0, 0, 0, 5, 0], [0, 0, 5, 0, 0, 0]], 3, "one", 0),  # no end before its begin; the first of equal ones
        ([[0, 0, 0, 0, 5, 0], [0, 0, 0, 0, 0, 0]], 3, "three", 9),  # white space is left out
    ],
)
def test_the_best_span(logits: Any, longest: int, text: str, begin: int) -> None:
    span = spans.best_span(window(), np.array(logits, np.float32).T, longest)
    assert span is not None and (span.text, span.begin, span.end) == (text, begin, begin + len(text))
    probabilities = [np.exp(np.array(side)) / np.exp(np.array(side)).sum() for side in logits]
    shown = (
        max(p * q for p in probabilities[0][2:5] for q in probabilities[1][2:5])
        if longest == 3 and text == "two  three"
        else None
    )
    assert shown is None or span.confidence == pytest.approx(shown)


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=1, max_size=12), st.integers(1, 12))
def test_the_best_span_is_the_best_of_all(pairs: list[tuple[int, int]], longest: int) -> None:
    size = len(pairs)
    row = window("x" * size, begins=(-1, *range(size)), ends=(-1, *range(1, size + 1)))
    span = spans.best_span(row, np.array([(99, 99), *pairs], np.float32), longest)
    every = {(pairs[i][0] + pairs[j][1], -i, -j) for i in range(size) for j in range(i, min(size, i + longest))}
    assert span is not None and span.score == max(every)[0]
    assert span.begin == -max(every)[1]


def test_windows_of_a_question_have_one_answer() -> None:
    """The best of all windows; no answer counts where every window says so."""
    rows = [window(), window(number=1), window()]
    nothing, best = [[9, 0, 0, 0, 0, 0]] * 2, [[0, 0, 0, 9, 0, 0], [0, 0, 0, 9, 0, 0]]
    heard: list[int] = []
    answers = spans.Reader(3, 0.0).predict(Given([nothing, best, nothing]), rows, heard.append)
    assert [(one.text, one.details["answer_start"], one.details["no_answer"]) for one in answers] == [
        ("two", 4, -18.0),
        ("", None, 18.0),
    ]
    assert heard == [1, 1, 1]
    assert [one.text for one in spans.Reader(3, None).predict(Given([nothing, best, nothing]), rows)] == ["two", "one"]
    assert [one.text for one in spans.Reader(3, 20.0).predict(Given([nothing, best, nothing]), rows)] == ["two", "one"]


def test_a_context_without_tokens_has_no_answer() -> None:
    row = window(begins=(-1, -1), ends=(-1, -1))
    (answer,) = spans.Reader(3, None).predict(Given([[[0, 0], [0, 0]]]), [row])
    assert (answer.text, answer.details) == ("", {"answer_start": None})


def test_scores_are_log_probabilities_of_begin_and_end() -> None:
    row = windows.ContextRow([1, 2, 3], [], (1, 2))
    logits = np.array([[1.0, 0.0], [2.0, 0.0], [3.0, 5.0]], np.float32)
    scores = spans.scores(row, logits)
    expected = logits - np.log(np.exp(logits).sum(0))
    assert scores.full is not None and scores.full == pytest.approx(expected.T, abs=1e-6)
    assert scores.targets == pytest.approx([expected[1, 0], expected[2, 1]], abs=1e-6) and scores.top1.tolist() == [
        2,
        2,
    ]
    assert TASK.distance(scores, scores) == pytest.approx([0, 0], abs=1e-6)


@pytest.mark.parametrize(
    ("margins", "right", "wanted"),
    [
        ([], [], 0.0),
        ([-4.0, -2.0, 1.0, 3.0], "aann", -0.5),
        ([-4.0, -2.0, 1.0, 3.0], "aaan", 2.0),
        ([-4.0, 1.0], "nn", -5.0),
        ([-4.0, 1.0], "aa", 2.0),
        ([1.0, 1.0, 1.0], "ana", 2.0),  # equal margins stay together
    ],
)
def test_the_threshold_of_no_answer(margins: list[float], right: str, wanted: float) -> None:
    """a: a question whose answer the model has right; n: one without an answer."""
    span = spans.Span(0.0, 0, 1, "x", 1.0)
    asked = [spans.Answered(span, margin) for margin in margins]
    assert spans.threshold(asked, [("x",) if one == "a" else () for one in right]) == wanted


@given(st.lists(st.tuples(st.integers(-5, 5), st.sampled_from("anw")), min_size=1, max_size=12))
def test_no_threshold_is_better(rows: list[tuple[int, str]]) -> None:
    asked = [spans.Answered(spans.Span(0.0, 0, 1, "x", 1.0), float(margin)) for margin, _ in rows]
    references: list[tuple[str, ...]] = [{"a": ("x",), "n": (), "w": ("y",)}[kind] for _, kind in rows]

    def right(limit: float) -> int:
        return sum(
            squad.exact("" if one.margin > limit else "x", true) for one, true in zip(asked, references, strict=True)
        )

    assert right(spans.threshold(asked, references)) == max(right(limit / 2) for limit in range(-13, 14))


def test_a_model_that_knows_nothing() -> None:
    rows = [window(), window(number=1)]
    uniform = spans.Uniform(0.75)
    for logits in uniform.logits(rows):
        shares = np.exp(logits)[:, 0]
        assert shares[2:5] == pytest.approx([0.25 / 3] * 3) and shares[0] == pytest.approx(0.75)
    assert [one.text for one in spans.Reader(3, 0.0).predict(uniform, rows)] == [""]
    assert [one.text for one in spans.Reader(3, None).predict(spans.Uniform(1e-3), rows)] == ["one"]


# --- SQuAD's rules ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "true", "exact", "f1"),
    [
        ("The Graz!", ["graz"], True, 1.0),
        ("the U.S.", ["US", "United States"], True, 1.0),
        ("in old Graz", ["Graz", "old town of Graz"], False, 4 / 7),
        ("a b b", ["b b c"], False, 4 / 5),  # a is an article; both b count
        ("theatre", ["atre"], False, 0.0),
        ("", [], True, 1.0),
        ("Graz", [], False, 0.0),
        ("", ["Graz"], False, 0.0),
        ("an", ["the"], True, 1.0),  # nothing is left of either
        ("", ["the", "Graz"], False, 0.0),
        ("one–two", ["one two"], False, 0.0),  # a dash that is not ASCII stays
    ],
)
def test_squads_rules(said: str, true: list[str], exact: bool, f1: float) -> None:
    assert squad.exact(said, true) is exact and squad.f1(said, true) == pytest.approx(f1)


answers = st.lists(st.sampled_from(["graz", "old", "town", "1561", "x"]), min_size=1, max_size=5)


@given(answers, answers, st.data())
def test_case_articles_and_punctuation_do_not_count(said: list[str], true: list[str], data: Any) -> None:
    def dressed(words: list[str]) -> str:
        parts = []
        for word in words:
            parts += [data.draw(st.sampled_from(["", "the", "A", "an"]))]
            parts += [
                data.draw(st.sampled_from([word, word.upper(), word.title()]))
                + data.draw(st.sampled_from(["", *string.punctuation]))
            ]
        return data.draw(st.sampled_from([" ", "  ", "\n"])).join(parts)

    plain = squad.f1(" ".join(said), [" ".join(true)])
    assert squad.f1(dressed(said), [dressed(true)]) == pytest.approx(plain)
    assert squad.exact(dressed(said), [dressed(true)]) == (said == true)
    assert (sorted(said) == sorted(true)) == (plain == 1)
    several = [" ".join(true), *(" ".join(data.draw(answers)) for _ in range(2))]
    assert squad.f1(" ".join(said), several) == max(squad.f1(" ".join(said), [one]) for one in several)
    assert squad.f1(" ".join(true), [" ".join(said)]) == pytest.approx(plain)


def test_figures_of_answers() -> None:
    said, true = ["graz", "old graz", "", "x"], [["Graz"], ["graz"], [], []]
    every = figures(squad.figures_of_answers(said, true))
    assert every == pytest.approx(
        {
            "f1": (1 + 2 / 3 + 1 + 0) / 4,
            "has_answer_exact": 0.5,
            "has_answer_f1": (1 + 2 / 3) / 2,
            "no_answer_exact": 0.5,
        }
    )
    assert figures(squad.figures_of_answers(said[:2], true[:2])).keys() == {"f1"}


def test_identity_keeps_the_questions_on_a_text_together() -> None:
    one, other = (Question(q, CONTEXT, (("Graz", 20),)) for q in ("Where?", "Which town?"))
    assert TASK.identity(one).group == TASK.identity(other).group == CONTEXT
    assert TASK.identity(one).question != TASK.identity(other).question


# --- requests ---------------------------------------------------------------------------------------------------------


def test_requests_are_answered(tmp_path: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "labels.json").write_text(json.dumps({"rows": {"train": {"answer": 2, "no answer": 1}}}))
    (tmp_path / "qkit.json").write_text(json.dumps({"stride": 3, "max_answer_tokens": 1}))
    service = TASK.service(tmp_path, 12)
    long = " ".join(WORDS[3:15])
    bad = [
        {"question": "ban"},
        {"question": " ", "context": long},
        {"question": "ban", "context": long, "threshold": "x"},
    ]
    asked = [{"question": "ban", "context": long}, *bad, {"question": "ban", "context": "den fin", "threshold": 99}]
    made = service.prepare([*asked, {"question": "ban " * 9, "context": long}])
    assert [str(one) for one in made if isinstance(one, RowError)] == [
        "has no context", "question is empty or contains only white space", "threshold must be a number, not 'x'",
        "has a question that leaves 0 of data.max_length=12 tokens for the context; windows share 3 (data.stride)",
    ]  # fmt: skip
    first, second = made[0], made[4]
    assert not isinstance(first, RowError) and not isinstance(second, RowError)
    assert [row.context[row.begins[3] : row.ends[-2]] for row in first.rows] == [
        " ".join(WORDS[3:11]),
        " ".join(WORDS[8:15]),
    ]  # type: ignore[attr-defined]
    logits = [np.zeros((len(row.input_ids), 2), np.float32) for row in first.rows]
    logits[1][4] = 5  # WORDS[9], in the second window
    found = service.answer(first, logits)
    begin = long.index(WORDS[9])
    assert (found["answer"], found["start"], found["end"], found["no_answer"]) == (
        WORDS[9],
        begin,
        begin + len(WORDS[9]),
        -10.0,
    )
    nothing = [
        np.where(np.arange(len(ids)) == 0, 3.0, 0.0)[:, None].repeat(2, 1)
        for ids in [row.input_ids for row in first.rows]
    ]
    assert service.answer(first, nothing) == {"answer": "", "start": None, "end": None, "score": None, "no_answer": 6.0}
    kept = [np.zeros((len(second.rows[0].input_ids), 2), np.float32)]
    kept[0][0] = 40  # 80 better, which the request's threshold of 99 allows
    assert service.answer(second, kept)["answer"] == "den"
    assert not service.difference(found, {**found, "score": found["score"] + 1e-4}, 1e-3)
    assert "not 'fin'" not in service.difference(found, {**found, "score": found["score"] - 0.1}, 1e-3) != ""
    assert "the answer is ''" in service.difference(found, {**found, "answer": "", "score": None}, 1e-3)
    at, off = ({**found, "no_answer": margin} for margin in (-3e-3, -5e-3))  # the threshold is 0
    none = {"answer": "", "start": None, "end": None, "score": None, "no_answer": 3e-3}
    assert not service.difference(at, none, 1e-3) and not service.difference(none, at, 1e-3)
    assert service.difference(off, none, 1e-3) and service.difference(at, {**none, "no_answer": 5e-3}, 1e-3)
    (tmp_path / "labels.json").unlink()
    with pytest.raises(ModelError, match=r"labels.json is missing"):
        TASK.service(tmp_path, 12)


def test_requests_of_records_and_of_prepared_rows() -> None:
    assert TASK.request(record(), {}) == {"question": "Where?", "context": CONTEXT}
    assert TASK.request({"text": "q", "pair": "c", "begins": []}, {}) == {"question": "q", "context": "c"}
    assert TASK.request({"q": "?", "text": "c"}, {"question": "q"}) == {"question": "?", "context": "c"}
    with pytest.raises(RowError, match="a column for question"):
        TASK.request({"context": "c"}, {})
