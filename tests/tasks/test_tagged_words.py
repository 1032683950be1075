"""The task `tag` through the stage `data`: every kind of input, schemes, tags by token, what is cut, and the checks of a set."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from helpers.tiny_labelled import WORDS, build_model, settings, write_rows
from helpers.tiny_tagged import TAGS, sentences, write_conll
from qkit.core.errors import DataError, RecipeError
from qkit.core.progress import Progress
from qkit.data import stage as data_stage
from qkit.plugins.example import RowError, TaggedWords
from qkit.plugins.task import open_task
from qkit.recipe.load import from_dict
from qkit.recipe.schema import Data
from qkit.tasks._encoder.tagging.records import tagged_words
from qkit.tasks._encoder.tagging.rows import as_iob2, in_names, names_of

IDS = {word: 4 + number for number, word in enumerate(WORDS)}
SENTENCES = sentences(24)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("bert"), "bert")


class Prepared:
    """What the stage `data` makes of sources. `test`: held-out sentences, if any."""

    def __init__(self, folder: Path, model: Path, train: Mapping[str, Any], test: Any = (), **data: Any):
        held_out = [{"source": str(write_conll(folder / "test.conll", test))}] if test else []
        section: dict[str, Any] = {"train": [train], "test": held_out, "max_length": 32, **data}
        if not held_out:
            section["split"] = {"train": 1.0}
        self.recipe = from_dict({**settings(model, folder, task="tag"), "data": section}, (), "the test")
        (folder / "out").mkdir(parents=True)
        self.summary = data_stage.prepare(self.recipe, folder / "out", Progress())
        self.train, self.test = (
            pq.read_table(folder / "out" / f"{name}.parquet").to_pylist() for name in ("train", "test")
        )
        labels = folder / "out" / "labels.json"
        self.labels: dict[str, Any] = json.loads(labels.read_text()) if labels.exists() else {}

    def check(self, name: str) -> Mapping[str, Any]:
        found: Mapping[str, Any] = next(check for check in self.summary["checks"] if check["name"] == name)
        return found

    def failed(self) -> list[str]:
        return [check["name"] for check in self.summary["checks"] if check["status"] == "fail"]


# --- every kind of input ----------------------------------------------------------------------------------------------


def _conll(folder: Path, separator: str = "\t", name: str = "rows.conll") -> dict[str, Any]:
    return {"source": str(write_conll(folder / name, SENTENCES, separator))}


def _four_columns(folder: Path) -> dict[str, Any]:
    blocks = ["".join(f"{n}\t{w}\t{t}\tx\n" for n, (w, t) in enumerate(zip(*one, strict=True))) for one in SENTENCES]
    file = folder / "rows.txt"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(blocks), encoding="utf-8")
    return {"source": str(file), "format": "conll", "word_column": 1, "tag_column": 2}


def _lists(folder: Path) -> dict[str, Any]:
    return {"source": str(write_rows(folder / "rows.jsonl", [{"tokens": w, "ner_tags": t} for w, t in SENTENCES]))}


def _ids_with_names(folder: Path) -> dict[str, Any]:
    """As data sets on the hub have them."""
    from datasets import ClassLabel, Dataset, Features, List, Value

    folder.mkdir(parents=True)
    features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=list(TAGS)))})
    columns = {
        "tokens": [list(w) for w, _ in SENTENCES],
        "ner_tags": [[TAGS.index(x) for x in t] for _, t in SENTENCES],
    }
    Dataset.from_dict(columns, features=features).to_parquet(str(folder / "rows.parquet"))
    return {"source": str(folder / "rows.parquet")}


def _spans(folder: Path) -> dict[str, Any]:
    rows = []
    for words, tags in SENTENCES:
        begins = [sum(len(word) + 1 for word in words[:place]) for place in range(len(words) + 1)]
        spans, place = [], 0
        while place < len(words):
            end = place + 1
            if tags[place].startswith("B"):
                while end < len(words) and tags[end].startswith("I"):
                    end += 1
                spans.append({"start": begins[place], "end": begins[end] - 1, "label": tags[place][2:]})
            place = end
        rows.append({"text": " ".join(words), "entities": spans})
    return {"source": str(write_rows(folder / "rows.jsonl", rows))}


INPUTS = {
    "tabs": _conll,
    "spaces": lambda folder: _conll(folder, " "),
    "other columns": _four_columns,
    "lists": _lists,
    "ids with names": _ids_with_names,
    "spans": _spans,
}


@pytest.mark.parametrize("kind", INPUTS)
def test_every_kind_of_input_gives_the_same_rows(model: Path, tmp_path: Path, kind: str) -> None:
    done = Prepared(tmp_path, model, INPUTS[kind](tmp_path / "in"))
    assert done.labels["names"] == list(TAGS) and not done.failed()
    assert len(done.train) == len(SENTENCES)
    for row, (words, tags) in zip(done.train, SENTENCES, strict=True):
        assert row["input_ids"] == [1, *(IDS[word] for word in words), 2]
        assert (row["words"], row["names"]) == ([*words], [*tags])
        assert row["labels"] == [-100, *(TAGS.index(tag) for tag in tags), -100]
        assert (row["starts"], row["further"]) == ([*range(1, len(words) + 1)], [])


def test_a_file_and_line_for_each_message(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.conll"
    file.write_text("apple\tB-fruit\nban\tO\n\nban\tO\nben\n\nbin\tO\n", encoding="utf-8")
    done = Prepared(tmp_path / "a", model, {"source": str(file)}, clean={"malformed": "drop"})
    found = done.check("malformed")
    assert found["found"] == 1 and found["rows"][0] == {"source": str(file), "line": 5}
    assert "'ben' has one column: its tag is missing" in found["message"]
    rows = write_rows(
        tmp_path / "rows.jsonl", [{"tokens": ["apple"], "tags": ["O"]}, {"tokens": ["a", "b"], "tags": ["O"]}]
    )
    done = Prepared(tmp_path / "b", model, {"source": str(rows)})
    assert "malformed" in done.failed()
    assert f"{rows}:2" in done.check("malformed")["message"] or done.check("malformed")["rows"][0]["line"] == 2
    assert "has 2 words in tokens and 1 tags in tags" in done.check("malformed")["message"]


@pytest.mark.parametrize(("content", "said"), [(b"\xff\xfea\x00", "UTF-16"), (b"a\tO\n\xe9\tO\n", ":2: invalid UTF-8")])
def test_files_in_another_encoding(model: Path, tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "rows.conll").write_bytes(content)
    with pytest.raises(DataError, match=said):
        Prepared(tmp_path / "a", model, {"source": str(tmp_path / "rows.conll")})


def test_columns_of_other_files_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"data\.train\.0\.tag_column=2 applies to CoNLL files"):
        Prepared(tmp_path, model, {"source": "rows.jsonl", "tag_column": 2})


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"tokens": ["a"], "tags": [3]}, "tags has the number 3 for a tag"),
        ({"tokens": ["a", ""], "tags": ["O", "O"]}, "tokens: word 1 (counted from 0) is not a text"),
        ({"tokens": ["a", None], "tags": ["O", "O"]}, "tokens: word 1"),
        ({"tokens": ["a"], "tags": [" "]}, "tags has no name for a tag"),
        ({"tokens": {"a": 1}, "tags": ["O"]}, "tokens is not a list"),
        ({"tokens": "[a", "tags": "O"}, "begins like a JSON list"),
        ({"tokens": [], "tags": []}, "tokens has no words"),
        ({"tokens": ["a\ufffd"], "tags": ["O"]}, "U+FFFD"),
        (
            {"words": ["a"]},
            "must have words and tags (words, tokens; tags, ner_tags, labels, ner), or a text and spans",
        ),
        ({"text": "apple ban", "spans": [{"start": 0, "end": 4, "label": "x"}]}, "ends inside the word 'apple'"),
        ({"text": "apple", "spans": [{"start": 0, "end": 9, "label": "x"}]}, "exceeds the text"),
        ({"text": "apple", "spans": [[0, 5, "x"], [0, 5, "y"]]}, "overlap"),
        ({"text": "apple", "spans": [[0, "5", "x"]]}, "a span that is not {start: number"),
        ({"text": "apple", "spans": 5}, "spans is not a list"),
        ({"text": 5, "spans": []}, "text is not a text"),
    ],
)
def test_what_is_refused(record: Mapping[str, Any], said: str) -> None:
    with pytest.raises(RowError, match=re.escape(said)):
        tagged_words(record, Data())


@pytest.mark.parametrize(
    "record",
    [
        {"tokens": "ban apple", "tags": "O B-fruit"},
        {"tokens": '["ban", "apple"]', "tags": '["O", "B-fruit"]'},
        {"text": "ban apple", "spans": [[4, 9, "fruit"]]},
        {"text": "ban apple", "spans": '[{"start": 4, "end": 9, "label": "fruit"}]'},
    ],
)
def test_forms_of_lists(record: Mapping[str, Any]) -> None:
    assert tagged_words(record, Data()) == TaggedWords(("ban", "apple"), ("O", "B-fruit"))


def test_names_have_no_spaces() -> None:
    record = {"text": "apple", "spans": [[0, 5, "sweet  fruit"]]}
    assert tagged_words(record, Data()).tags == ("B-sweet_fruit",)


def test_columns_are_mapped_and_unread_ones_told() -> None:
    record = {"id": 7, "w": ["a"], "t": ["O"], "pos": ["NN"]}
    example = tagged_words(record, Data(columns={"words": "w", "tags": "t"}, ignore=("id",)))
    assert (example.words, example.unread, example.ignored) == (("a",), ("pos",), ("id",))
    with pytest.raises(RowError, match=r"has no column 'x' \(data.columns maps tags to it\)"):
        tagged_words(record, Data(columns={"words": "w", "tags": "x"}))
    wrong = open_task("tag").unknown_column(Data(columns={"word": "w"}), frozenset())  # type: ignore[arg-type]
    assert "'word' is not a name that this task reads" in wrong and "words" in wrong


# --- schemes ----------------------------------------------------------------------------------------------------------

SCHEMES = {
    "IOB2": "B-a I-a O B-a B-a B-b",
    "IOB1": "I-a I-a O I-a B-a I-b",
    "BIOES": "B-a E-a O S-a S-a S-b",
    "BILOU": "B-a L-a O U-a U-a U-b",
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes_become_iob2(model: Path, tmp_path: Path, scheme: str) -> None:
    given = [
        (words, tuple(SCHEMES[scheme].split()[: len(words)])) for words in (WORDS[n : n + 6] for n in range(0, 18, 6))
    ]
    done = Prepared(tmp_path, model, {"source": str(write_conll(tmp_path / "rows.conll", given))})
    assert [row["names"] for row in done.train] == [SCHEMES["IOB2"].split()] * 3
    assert done.labels["scheme"] == scheme and done.labels["names"] == ["O", "B-a", "I-a", "B-b", "I-b"]
    assert done.labels["entities"]["train"] == {"a": 9, "b": 3}
    found = done.check("tag_scheme")
    assert found["status"] == "pass" and ("converted to IOB2" in found["message"]) == (scheme != "IOB2")


def test_tags_without_positions() -> None:
    assert as_iob2(("E-mail", "E-mail", "O", "E-mail", "x"), plain=True) == (
        "B-E-mail",
        "I-E-mail",
        "O",
        "B-E-mail",
        "B-x",
    )
    names = {*names_of(["E-mail", "x"])}
    assert in_names(("E-mail", "E-mail"), names) == ("B-E-mail", "I-E-mail")
    assert in_names(("B-x", "I-x", "E-x"), names) == ("B-x", "I-x", "I-x")
    assert names_of(["_"]) == ["O", "B", "I"] and in_names(("B", "I", "I"), {"O", "B", "I"}) == ("B", "I", "I")


def test_tags_against_their_scheme_are_counted(model: Path, tmp_path: Path) -> None:
    given = [*SENTENCES, (("ban", "apple"), ("O", "I-fruit"))]
    done = Prepared(tmp_path, model, {"source": str(write_conll(tmp_path / "rows.conll", given))})
    found = done.check("tag_scheme")
    assert (found["status"], found["found"]) == ("warn", 1) and not done.failed()
    assert "I-fruit (word 1, counted from 0) follows O, which IOB2 does not allow" in found["message"]
    assert done.train[-1]["names"] == ["O", "B-fruit"]


def test_a_mixture_of_schemes_is_refused(model: Path, tmp_path: Path) -> None:
    given = [(("ban", "ben"), ("B-a", "b"))]
    with pytest.raises(DataError, match="some tags name a position and a type"):
        Prepared(tmp_path, model, {"source": str(write_conll(tmp_path / "rows.conll", given))})


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_the_first_token_carries_the_tag(model: Path, tmp_path: Path) -> None:
    given = [(("ban-ben", "\u00a0", "plum", "for"), ("O", "O", "B-tree", "I-tree")), *SENTENCES]
    done = Prepared(tmp_path, model, {"source": str(write_conll(tmp_path / "rows.conll", given))})
    row = done.train[0]
    assert row["input_ids"] == [1, IDS["ban"], 3, IDS["ben"], IDS["plum"], IDS["for"], 2]
    tree = done.labels["names"].index("B-tree")
    assert row["labels"] == [-100, 0, -100, -100, tree, tree + 1, -100] and row["starts"] == [1, -1, 4, 5]
    found = done.check("no_tokens")
    assert (found["status"], found["found"]) == ("warn", 1) and r"has 1 words without a token, such as '\xa0'" in found[
        "message"
    ]
    words = sum(len(words) for words, _ in given) - 1
    assert done.summary["splits"]["train"]["labelled_tokens"] == words


def test_a_sentence_without_tokens_is_dropped(model: Path, tmp_path: Path) -> None:
    given = [*SENTENCES, (("\u00a0", "\u2003"), ("O", "O"))]
    done = Prepared(tmp_path, model, {"source": str(write_conll(tmp_path / "rows.conll", given))})
    assert len(done.train) == len(SENTENCES) and done.check("empty")["found"] == 1


@pytest.mark.parametrize("too_long", ["truncate", "drop"])
def test_long_sentences(model: Path, tmp_path: Path, too_long: str) -> None:
    long = [(words, tags) for words, tags in SENTENCES if len(words) > 6]
    assert 0 < len(long) < len(SENTENCES)
    source = {"source": str(write_conll(tmp_path / "rows.conll", SENTENCES))}
    done = Prepared(tmp_path, model, source, max_length=8, too_long=too_long)
    name = "length" if too_long == "drop" else "text_cut"
    assert (done.check(name)["status"], done.check(name)["found"]) == ("warn", len(long))
    assert "more than data.max_length=8" in done.check(name)["message"]
    if too_long == "drop":
        assert len(done.train) == len(SENTENCES) - len(long)
        return
    for row, (words, tags) in zip(done.train, SENTENCES, strict=True):
        kept = min(len(words), 6)
        assert row["input_ids"] == [1, *(IDS[word] for word in words[:kept]), 2]
        assert [label for label in row["labels"] if label >= 0] == [TAGS.index(tag) for tag in tags[:kept]]
        tokens = [*row["input_ids"], *row["further"]]
        assert [tokens[start] for start in row["starts"]] == [IDS[word] for word in words]
        assert sum(row["sizes"]) == len(row["further"]) and row["names"] == [*tags]
    kept_words = sum(min(len(words), 6) for words, _ in SENTENCES)
    assert done.summary["splits"]["train"]["labelled_tokens"] == kept_words


# --- the set ----------------------------------------------------------------------------------------------------------


def odd(name: str) -> Any:
    """Sentences whose one entity has that type."""
    return [((WORDS[n], WORDS[n + 1]), (f"B-{name}", "O")) for n in range(3, 6)]


@pytest.mark.parametrize(
    ("train", "test", "check", "status", "said"),
    [
        (SENTENCES, odd("stone"), "labels", "fail", "3 held-out rows have entities of types that no training row has: stone"),
        (SENTENCES, (), "labels", "pass", "2 types of entities, with 8 to 16 in training each"),
        (odd("stone"), (), "labels", "pass", "one type of entity, stone, with 3 in training"),
        ([(("ban",), ("O",))], (), "labels", "fail", "no training row has an entity"),
        ([*SENTENCES, *odd("stone")], (), "rare_labels", "warn", "1 types have fewer than 5 entities in training: stone has 3"),
        ([*SENTENCES, *odd("Fruit")], (), "label_names", "warn", "Fruit (3 entities) and fruit (8); if they mean the same"),
        ([*SENTENCES, (SENTENCES[0][0], ("O",) * len(SENTENCES[0][0]))], (), "label_conflicts", "warn", "1 sentences have different"),
        (SENTENCES, (), "label_conflicts", "pass", "no sentence"),
    ],
)  # fmt: skip
def test_checks_of_the_set(
    model: Path, tmp_path: Path, train: Any, test: Any, check: str, status: str, said: str
) -> None:
    done = Prepared(tmp_path, model, {"source": str(write_conll(tmp_path / "rows.conll", train))}, test)
    assert done.check(check)["status"] == status and said in done.check(check)["message"]
    if check == "labels" and test:
        assert [label for row in done.test for label in row["labels"] if label != -100].count(-1) == 3


def test_what_labels_json_counts(model: Path, tmp_path: Path) -> None:
    done = Prepared(
        tmp_path, model, {"source": str(write_conll(tmp_path / "rows.conll", SENTENCES[8:]))}, SENTENCES[:8]
    )
    tags = [tag for _, of_row in SENTENCES[8:] for tag in of_row]
    assert done.labels["rows"]["train"] == {name: tags.count(name) for name in TAGS}
    assert done.labels["rows"]["train"]["I-fruit"] == 0 and done.labels["names"] == list(TAGS)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"text": "ban apple, ben.", "entities": [[4, 9, "fruit"]]}], ["ban", "apple", ",", "ben", "."]),
        ([{"tokens": ["ban", "apple,", "ben."], "ner_tags": ["O", "B-fruit", "O"]}], ["ban", "apple,", "ben."]),
    ],
)
def test_a_text_is_divided_into_the_words_of_training(
    model: Path, tmp_path: Path, rows: list[Any], words: list[str]
) -> None:
    """By what labels.json says, which lies with every artifact."""
    done = Prepared(tmp_path, model, {"source": str(write_rows(tmp_path / "rows.jsonl", rows))})
    assert done.train[0]["words"] == words
    shutil.copytree(model, tmp_path / "artifact")
    shutil.copy(tmp_path / "out" / "labels.json", tmp_path / "artifact")
    service: Any = open_task("tag").service(tmp_path / "artifact", 32)
    for request in ({"text": "ban apple, ben."}, open_task("tag").request(done.train[0], {})):
        (prepared,) = service.prepare([request])
        assert [*prepared.rows[0].input_ids] == done.train[0]["input_ids"]
        logits = [np.zeros((len(row.input_ids), len(service.tagger.names)), np.float32) for row in prepared.rows]
        assert service.answer(prepared, logits)["words"] == words


def test_texts_and_lists_together(model: Path, tmp_path: Path) -> None:
    """A text without words is divided as those that had none in training."""
    rows = [{"tokens": ["ban", "apple"], "tags": ["O", "B-fruit"]}, {"text": "apple", "spans": [[0, 5, "fruit"]]}]
    done = Prepared(tmp_path, model, {"source": str(write_rows(tmp_path / "rows.jsonl", rows))})
    assert done.labels["divided"] == "by kind of character"
