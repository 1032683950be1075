"""The task `classify` through the stage `data`: tokens and what is cut, label ids, checks of the labels, and the default split."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from helpers.tiny_labelled import LABELS, WORDS, build_model, labelled_rows, settings, text, write_rows
from qkit.core.progress import Progress
from qkit.data import stage as data_stage
from qkit.plugins.checks import Place, SetRow
from qkit.recipe.load import from_dict
from qkit.recipe.schema import Recipe
from qkit.tasks import classify

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("bert"), "bert")


class Prepared:
    """What the stage `data` makes of rows. `test`: held-out rows, if any."""

    def __init__(self, folder: Path, model: Path, rows: Any, test: Any = None, **data: Any):
        section: dict[str, Any] = {"train": [{"source": str(write_rows(folder / "train.jsonl", rows))}], **data}
        if test is not None:
            section["test"] = [{"source": str(write_rows(folder / "test.jsonl", test))}]
        self.recipe = from_dict({**settings(model, folder), "data": section}, (), "the test")
        (folder / "out").mkdir()
        self.summary = data_stage.prepare(self.recipe, folder / "out", Progress())
        self.rows = {split: pq.read_table(folder / "out" / f"{split}.parquet").to_pylist() for split in SPLITS}
        labels = folder / "out" / "labels.json"
        self.labels: dict[str, Any] = json.loads(labels.read_text()) if labels.exists() else {}

    def check(self, name: str) -> Mapping[str, Any]:
        found: Mapping[str, Any] = next(check for check in self.summary["checks"] if check["name"] == name)
        return found

    def failed(self) -> list[str]:
        return [check["name"] for check in self.summary["checks"] if check["status"] == "fail"]


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_tokens_of_texts_and_pairs(model: Path, tmp_path: Path) -> None:
    rows = [{**row, **({"pair": text(i + 1)} if i % 2 else {})} for i, row in enumerate(labelled_rows(24))]
    done = Prepared(tmp_path, model, [{"pair": None, **row} if "pair" in row else row for row in rows], test=rows[:3])
    ids = {word: 4 + number for number, word in enumerate(WORDS)}
    for made, row in zip(done.rows["train"], rows, strict=True):
        first, second = ([ids[word] for word in row.get(name, "").split()] for name in ("text", "pair"))
        assert made["input_ids"] == [1, *first, 2, *([*second, 2] if second else [])]
        assert made["token_type_ids"] == [0] * (len(first) + 2) + [1] * (len(second) + 1 if second else 0)
        assert (made["names"], made["labels"]) == ([row["label"]], [LABELS.index(row["label"])])


@pytest.mark.parametrize("too_long", ["truncate", "drop"])
def test_long_texts_are_counted(model: Path, tmp_path: Path, too_long: str) -> None:
    rows = labelled_rows(24)
    lengths = [len(row["text"].split()) + 2 for row in rows]
    long = sum(length > 8 for length in lengths)
    assert 0 < long < len(rows)
    done = Prepared(tmp_path, model, rows, test=rows[:0], max_length=8, too_long=too_long)
    kept = [length for length in lengths if length <= 8] if too_long == "drop" else [min(8, n) for n in lengths]
    assert [len(row["input_ids"]) for row in done.rows["train"]] == kept
    name, other = ("length", "text_cut") if too_long == "drop" else ("text_cut", "length")
    assert (done.check(name)["status"], done.check(name)["found"]) == ("warn", long)
    assert done.check(other)["status"] == "pass"
    said = "more than data.max_length=8" if too_long == "drop" else "of which data.max_length=8 keeps the first"
    assert said in done.check(name)["message"]
    train = done.summary["splits"]["train"]
    assert (train["kept"], train["dropped"]) == ((24 - long, long) if too_long == "drop" else (24, 0))
    if too_long == "truncate":
        assert all(row["input_ids"][-1] == 2 for row in done.rows["train"])


def test_both_texts_of_a_pair_are_cut(model: Path, tmp_path: Path) -> None:
    words = " ".join(WORDS[:12])
    rows = [{"text": f"{words} {row['text']}", "pair": words, "label": row["label"]} for row in labelled_rows(12)]
    done = Prepared(tmp_path, model, rows, test=rows[:0], max_length=13)
    assert {tuple(row["token_type_ids"]) for row in done.rows["train"]} == {(0,) * 7 + (1,) * 6}


def test_texts_beyond_the_positions_fail(tmp_path: Path) -> None:
    """RoBERTa's first position is the one after padding: of 34 positions with padding 1, 32 are left."""
    for positions, failed in ((34, ["positions"]), (35, [])):
        folder = tmp_path / str(positions)
        model = build_model(folder / "model", "roberta", max_position_embeddings=positions, pad_token_id=1)
        rows = [{**row, "text": " ".join([row["text"]] * 11)} for row in labelled_rows(24)]
        assert Prepared(folder, model, rows, test=rows[:0], max_length=33).failed() == failed


def test_texts_in_an_unknown_script(model: Path, tmp_path: Path) -> None:
    done = Prepared(tmp_path, model, [*labelled_rows(24), {"text": "яблоко и груша", "label": "fruit"}], test=[])
    assert (done.check("unknown")["status"], done.check("unknown")["found"]) == ("warn", 1)
    assert "has 3 unknown tokens of 3" in done.check("unknown")["message"]


# --- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["tree", "Wood", "apple"], ["Wood", "apple", "tree"]),
        (["10", "9", "100"], ["9", "10", "100"]),
        (["01", "1", "001"], ["001", "01", "1"]),
        (["10", "9", "x"], ["10", "9", "x"]),
    ],
)
def test_label_ids(given: list[str], names: list[str]) -> None:
    rows = [SetRow("train", str(number), (name,), Place("f", number)) for number, name in enumerate(given)]
    held_out = SetRow("test", "q", ("unseen",), Place("f", 9))
    for order in (rows, rows[::-1], rows[1:] + rows[:1]):
        assert classify.TASK.labels([held_out, *order])["names"] == names


def test_what_labels_json_says(model: Path, tmp_path: Path) -> None:
    rows = labelled_rows(30)
    done = Prepared(tmp_path, model, [*rows[10:], rows[11]], test=rows[:10])  # a duplicate is dropped
    train = Counter(row["label"] for row in rows[10:])
    test = Counter(row["label"] for row in rows[:10])
    assert done.labels == {
        "names": sorted(LABELS),
        "rows": {"train": dict(train), "validation": dict.fromkeys(LABELS, 0), "test": dict(test)},
    }


def test_a_label_that_only_held_out_rows_have(model: Path, tmp_path: Path) -> None:
    test = [*labelled_rows(30)[24:], {"text": "apple ban", "label": "stone"}]
    done = Prepared(tmp_path, model, labelled_rows(24), test=test)
    found = done.check("labels")
    assert done.failed() == ["labels"]
    assert found["found"] == 1 and "1 held-out rows have labels that no training row has: stone" in found["message"]
    assert found["rows"][0]["line"] == 7 and found["rows"][0]["source"].endswith("test.jsonl")
    assert [row["labels"] for row in done.rows["test"]][-1] == [-1] and done.labels["names"] == sorted(LABELS)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["fruit"], "the training rows have 1 label (fruit): nothing can be learned"),
        ([], "the training rows have no label"),
    ],
)
def test_nothing_to_tell_apart(model: Path, tmp_path: Path, labels: list[str], said: str) -> None:
    rows = [{"text": text(i), "label": name} for i in range(8) for name in labels]
    done = Prepared(tmp_path, model, rows or [{"text": " ", "label": "fruit"}], test=[])
    assert "labels" in done.failed() and said in done.check("labels")["message"]


def test_odd_labels_are_told(model: Path, tmp_path: Path) -> None:
    rows = labelled_rows(24)
    odd = [{"text": text(i), "label": "Fruit "} for i in range(40, 43)]
    both = [{"text": rows[0]["text"].upper(), "label": "tree"}]
    done = Prepared(tmp_path, model, [*rows, *odd, *both], test=[])
    for name, said in (
        ("rare_labels", "1 labels have fewer than 5 training rows: label 'Fruit' has 3 rows, fewer than 5"),
        ("label_names", "labels 'Fruit' (3 rows) and 'fruit' (8 rows) differ only in case"),
        ("label_conflicts", "no classifier can get more than 27 of these 28 rows right"),
    ):
        assert done.check(name)["status"] == "warn" and said in done.check(name)["message"], name
    assert not done.failed()


# --- the default split ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["label", "intent"])
def test_rows_are_split_by_label_and_equal_texts_stay_together(model: Path, tmp_path: Path, column: str) -> None:
    rows = [{"text": text(i), column: LABELS[min(i % 10, 2)]} for i in range(200)]
    twice = [{"text": row["text"], column: LABELS[i % 3]} for i, row in enumerate(rows[:60])]
    done = Prepared(tmp_path, model, [*rows, *twice])
    assert done.recipe.data.split is not None
    assert done.recipe.data.split.model_dump() == {"train": 0.8, "validation": 0.1, "test": 0.1}
    places = defaultdict(set)
    for split, made in done.rows.items():
        for row in made:
            places[row["text"]].add(split)
    assert {len(splits) for splits in places.values()} == {1}
    texts = {name: {row["text"] for row in rows if row[column] == name} for name in LABELS}
    for name, of_label in texts.items():
        shares = Counter(next(iter(places[t])) for t in of_label)
        assert [shares[split] for split in SPLITS] == pytest.approx(
            [len(of_label) * s for s in (0.8, 0.1, 0.1)], abs=1
        ), name


@pytest.mark.parametrize("section", [{"split": {"train": 0.5, "test": 0.5}}, {"test": [{"source": "t.jsonl"}]}])
def test_a_split_that_the_recipe_has_stays(section: dict[str, Any]) -> None:
    raw = {"task": "classify", "model": {"source": "owner/x"}, "data": {"train": [{"source": "a.jsonl"}], **section}}
    recipe: Recipe = from_dict(raw, (), "the test")
    given = section.get("split")
    assert (recipe.data.split and recipe.data.split.model_dump(exclude_defaults=True)) == given
