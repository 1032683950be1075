"""Records with a text and a label: which columns are read, what is refused and where, and that every file format gives the same rows."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.tiny_labelled import build_model, labelled_rows, settings, text
from qkit.core.errors import DataError
from qkit.core.progress import Progress
from qkit.data import read as data_read
from qkit.data import stage as data_stage
from qkit.plugins.example import LabelledText, RowError
from qkit.recipe.load import from_dict
from qkit.recipe.schema import Data, Source
from qkit.tasks import classify
from qkit.tasks._encoder.labelled_text import COLUMNS, labelled_text

BOTH = {"text": "apple ban", "label": "fruit"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("bert"), "bert")


def read(record: Mapping[str, Any], **section: Any) -> LabelledText:
    example = classify.TASK.example(record, None, "auto", Data(**section))
    assert isinstance(example, LabelledText)
    return example


@pytest.mark.parametrize("name", COLUMNS["text"])
def test_columns_for_a_text(name: str) -> None:
    assert read({name: "apple", "label": "fruit"}) == LabelledText("apple", None, ("fruit",))


@pytest.mark.parametrize("name", COLUMNS["pair"])
def test_columns_for_a_second_text(name: str) -> None:
    assert read({"sentence1": "apple", name: "pear", "label": "fruit"}) == LabelledText("apple", "pear", ("fruit",))


@pytest.mark.parametrize("name", COLUMNS["label"])
def test_columns_for_a_label(name: str) -> None:
    example = read({"text": "apple", name: "fruit"})
    assert example.labels == ("fruit",) and example.unread == ()


def test_other_columns_are_mapped_and_take_no_second_part() -> None:
    columns = {"text": "sentence2", "pair": "sentence1", "label": "verdict"}
    record = {"sentence1": "apple", "sentence2": "pear", "verdict": 3, "label": "another"}
    example = read(record, columns=columns)
    assert (example.text, example.pair, example.labels, example.unread) == ("pear", "apple", ("3",), ("label",))
    assert read({"sentence2": "pear", "label": 1}, columns={"text": "sentence2"}).pair is None


@pytest.mark.parametrize(
    ("value", "name"),
    [(3, "3"), (0, "0"), (-1, "-1"), (True, "True"), (False, "False"), (" a b ", "a b"), (["x"], "x")],
)
def test_values_that_are_labels(value: object, name: str) -> None:
    assert read({"text": "apple", "label": value}).labels == (name,)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "label is not a label: None"),
        (1.0, "label is not a label: 1.0"),
        ("  ", "label is not a label: '  '"),
        ({"a": 1}, "label is not a label: {'a': 1}"),
        ([], "has 0 labels; task=classify gives a text exactly one, task=multi_label any number"),
        (["a", "b"], "has 2 labels; task=classify gives a text exactly one, task=multi_label any number"),
        ([0.5], "label is not a label: 0.5"),
    ],
)
def test_values_that_are_no_label(value: object, said: str) -> None:
    with pytest.raises(RowError) as raised:
        read({"text": "apple", "label": value})
    assert raised.value.rule == "malformed" and str(raised.value) == said


@pytest.mark.parametrize(
    ("record", "section", "rule", "said"),
    [
        ({"label": "fruit"}, {}, "malformed", "it must have a column for text: text, sentence, "),
        ({"text": "apple"}, {}, "malformed", "it must have a column for label: label, labels, "),
        (BOTH, {"columns": {"pair": "sekond"}}, "malformed", "no column 'sekond' (data.columns maps pair to it)"),
        ({**BOTH, "second": "x"}, {"columns": {"pair": "sekond"}}, "malformed", "did you mean 'second'?"),
        ({**BOTH, "text": " \n"}, {}, "empty", "text is empty or contains only white space"),
        ({**BOTH, "text": None}, {}, "empty", "text is empty or contains only white space"),
        ({**BOTH, "pair": ""}, {}, "empty", "pair is empty or contains only white space"),
        ({**BOTH, "text": 3}, {}, "malformed", "text is not a text: 3"),
        ({**BOTH, "text": "a\ud800"}, {}, "unicode", "text"),
        ({**BOTH, "label": "a\ud800"}, {}, "unicode", "label"),
        ({**BOTH, "pair": "a\x00"}, {}, "unicode", "pair"),
    ],
)
def test_records_that_cannot_be_used(record: Any, section: Any, rule: str, said: str) -> None:
    with pytest.raises(RowError) as raised:
        read(record, **section)
    assert raised.value.rule == rule and said in str(raised.value)


def test_columns_that_nothing_reads() -> None:
    record = {**BOTH, "sentence": "x", "meta": {"a": 1}, "none": None, "blank": "", "group": "g", "id": 7}
    example = read(record, group="group", ignore=("id", "m*"))
    assert example.unread == ("sentence",) and {*example.ignored} == {"id", "m*"}


# --- files ------------------------------------------------------------------------------------------------------------


def write(file: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    if file.suffix == ".csv":
        with file.open("w", newline="", encoding="utf-8") as opened:
            writer = csv.DictWriter(opened, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def prepared(model: Path, file: Path, out: Path, **data: Any) -> dict[str, Any]:
    """summary.json of these rows, all of which train."""
    out.mkdir()
    section = {"train": [{"source": str(file)}], "test": [], "max_length": 32, **data}
    recipe = from_dict({**settings(model, file), "data": section}, (), "the test")
    return data_stage.prepare(recipe, out, Progress())


def check(summary: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return next(check for check in summary["checks"] if check["name"] == name)


@pytest.mark.parametrize(
    "labels",
    [["fruit", "tree", "wood"], [0, 1, 2], [10, 9, 100], [True, False, True]],
    ids=["names", "numbers", "order", "bool"],
)
def test_formats_of_files_give_the_same_rows(model: Path, tmp_path: Path, labels: list[Any]) -> None:
    rows = [{"text": f'{text(i)}, "quoted"\nand "ü"', "pair": text(i + 1), "label": labels[i % 3]} for i in range(30)]
    tables, names = [], []
    for kind in ("jsonl", "csv", "parquet"):
        prepared(model, write(tmp_path / f"rows.{kind}", rows), tmp_path / kind)
        tables.append(pq.read_table(tmp_path / kind / "train.parquet").drop_columns("place").to_pylist())
        names.append(json.loads((tmp_path / kind / "labels.json").read_text()))
    assert tables[0] == tables[1] == tables[2] and len(tables[0]) == 30
    assert names[0] == names[1] == names[2]
    assert {row["pair"] for row in tables[0]} == {row["pair"] for row in rows}


def test_the_place_of_a_bad_record_is_named(model: Path, tmp_path: Path) -> None:
    rows = labelled_rows(12)
    rows[4] = {"text": "apple ban", "label": None}
    rows[7] = {"text": "apple ban", "label": "a\ud800"}
    rows[9] = {"text": "", "label": "fruit"}
    summary = prepared(model, write(tmp_path / "rows.jsonl", rows), tmp_path / "out")
    malformed, unicode, empty = (check(summary, name) for name in ("malformed", "unicode", "empty"))
    assert malformed["status"] == "fail" and "rows.jsonl:5 label is not a label: None" in malformed["message"]
    assert [place["line"] for place in malformed["rows"]] == [5]
    assert malformed["rows"][0]["source"].endswith("rows.jsonl")
    assert (unicode["status"], [place["line"] for place in unicode["rows"]]) == ("warn", [8])
    assert (empty["status"], [place["line"] for place in empty["rows"]]) == ("warn", [10])
    assert summary["splits"]["train"] | {"records": 12, "kept": 9, "dropped": 3} == summary["splits"]["train"]


def test_a_name_that_nobody_reads(model: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", labelled_rows(12))
    with pytest.raises(
        DataError, match=r"data\.columns maps 'txt' to 'body', but 'txt' is not a name that this task reads"
    ):
        prepared(model, file, tmp_path / "out", columns={"txt": "body"})


def test_unread_columns_are_counted(model: Path, tmp_path: Path) -> None:
    rows = [{**row, "note": "x", "id": i} for i, row in enumerate(labelled_rows(12))]
    summary = prepared(model, write(tmp_path / "rows.jsonl", rows), tmp_path / "out", ignore=["id"])
    found = check(summary, "unused")
    assert found["status"] == "warn" and "note in 12" in found["message"] and "id in" not in found["message"]


def test_ids_of_a_class_label_are_read_as_names(tmp_path: Path) -> None:
    """As data sets on the hub have them; -1 is a label that is kept secret."""
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["negative", "positive"])})
    rows = Dataset.from_dict({"text": ["good", "bad", "secret"], "label": [1, 0, -1]}, features=features)
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    rows.save_to_disk(str(tmp_path / "saved"))
    for source in ("rows.parquet", "saved"):
        read_rows = [
            one.value
            for one in data_read.read(Source(source=str(tmp_path / source)))
            if isinstance(one, data_read.Record)
        ]
        assert [row["label"] for row in read_rows] == ["positive", "negative", None], source
    with pytest.raises(RowError, match="label is not a label: None"):
        labelled_text(read_rows[2], Data())
