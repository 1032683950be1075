"""Rows and their ledger: splits, mixes, lengths, conversations of several rows, and what is written."""

from __future__ import annotations

import random
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.data_traps.models import FAMILIES, Tiny, build, tokenizer_of
from helpers.data_traps.prepared import Prepared, lines, prepare, prepare_rows, recipe
from helpers.data_traps.table import GOOD, HELD_OUT, LONG, SEVERAL, THINKING, TOOL, asked, calls, talk, tokens
from qkit.chat.template import renderer
from qkit.core import device
from qkit.core.batching import IGNORED
from qkit.core.errors import DataError
from qkit.data import prepare as data_prepare
from qkit.data import splits
from qkit.measure import held_out as measure_held_out
from qkit.plugins.example import Conversation
from qkit.plugins.task import open_task
from qkit.recipe import schema as recipe_schema
from qkit.recipe.schema import Data, Evaluate, Split
from qkit.tasks import chat
from qkit.tasks._conversation.checks import of_rows
from qkit.tasks._conversation.encode import tokenize
from qkit.tasks._conversation.rows import EncodedRow
from qkit.tasks._conversation.too_long import pieces

SEED = 42
HALVES = Split(train=0.5, validation=0.2, test=0.3)
KEYS = [f"group {number}" for number in range(2000)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(Tiny(), tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(FAMILIES["qwen3"], tmp_path_factory.mktemp("qwen3"))


def texts(rows: Sequence[Any], learnt: bool = False) -> list[str]:
    """Rows as text, or only what carries loss in them."""
    tokenizer = tokenizer_of(Tiny())
    chosen = [
        [t for t, label in zip(r["input_ids"], r["labels"], strict=True) if not learnt or label != IGNORED]
        for r in rows
    ]
    return [tokenizer.decode(ids) for ids in chosen]


# --- splits and mixes ---------------------------------------------------------------------------------------------------


def split_of(keys: Sequence[str], labels: Sequence[str | None] | None = None, seed: int = SEED) -> dict[str, str]:
    return dict(zip(keys, splits.assigned(keys, labels or [None] * len(keys), HALVES, seed), strict=True))


def test_adding_rows_moves_no_other() -> None:
    few, all_of_them = split_of(KEYS[500:1000]), split_of(random.Random(0).sample(KEYS, len(KEYS)))
    assert few.items() <= all_of_them.items()


def test_the_fractions_hold_and_seeds_differ() -> None:
    one, other = split_of(KEYS), split_of(KEYS, seed=SEED + 1)
    shares = Counter(one.values())
    for name in recipe_schema.SPLITS:
        wanted = getattr(HALVES, name) * len(KEYS)
        assert (
            abs(shares[name] - wanted) < 5 * (wanted * (1 - getattr(HALVES, name))) ** 0.5
        )  # of a binomial's deviation
    same = sum(one[key] == other[key] for key in KEYS) / len(KEYS)
    assert abs(same - (0.5**2 + 0.2**2 + 0.3**2)) < 0.06


def test_a_group_stays_together() -> None:
    groups = [f"group {row % 30}" for row in range(300)]
    drawn = splits.assigned(groups, [None] * 300, HALVES, SEED)
    assert len(set(zip(groups, drawn, strict=True))) == 30


@pytest.mark.parametrize("sizes", [(10, 100, 1000), (7, 13, 1)])
def test_every_split_has_its_share_of_every_label(sizes: Sequence[int]) -> None:
    """To within one group, whereas a hash alone gives or takes the square root."""
    labels = [f"label {number}" for number, size in enumerate(sizes) for _ in range(size)]
    drawn = splits.assigned(KEYS[: len(labels)], labels, HALVES, SEED)
    counted = Counter(zip(labels, drawn, strict=True))
    for label, size in Counter(labels).items():
        for name in recipe_schema.SPLITS:
            assert abs(counted[label, name] - getattr(HALVES, name) * size) <= 1


@pytest.mark.parametrize("rows_each", [1, 2, 4])
def test_labels_of_few_rows_are_held_out_too(rows_each: int) -> None:
    labels = [f"label {row // rows_each}" for row in range(60)]
    tenths = Split(train=0.8, validation=0.1, test=0.1)
    drawn = splits.assigned(KEYS[:60], labels, tenths, SEED)
    assert Counter(drawn) == {"train": 48, "validation": 6, "test": 6}
    backwards = splits.assigned(KEYS[:60][::-1], labels[::-1], tenths, SEED)
    assert backwards[::-1] == drawn


def test_many_labels_take_no_longer_than_few() -> None:
    """20,000 labels take the time of as many rows, not of their square (which is half a minute)."""
    keys = [str(number) for number in range(20_000)]
    begin = time.process_time()
    splits.assigned(keys, keys, HALVES, SEED)
    assert time.process_time() - begin < 2


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 2**32))
def test_with_labels_of_one_row_no_more_rows_cross_a_cut_than_were_added(before: int, added: int, seed: int) -> None:
    few, more = (split_of(KEYS[:rows], KEYS[:rows], seed) for rows in (before, before + added))
    for beyond in ({"train"}, {"train", "validation"}):
        assert sum((few[key] in beyond) != (more[key] in beyond) for key in few) <= added


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 2**32))
def test_with_labels_no_more_rows_cross_a_cut_than_were_added(before: int, added: int, seed: int) -> None:
    few = split_of(KEYS[:before], ["one"] * before, seed)
    more = split_of(KEYS[: before + added], ["one"] * (before + added), seed)
    for beyond in ({"train"}, {"train", "validation"}):
        assert sum((few[key] in beyond) != (more[key] in beyond) for key in few) <= added


@pytest.mark.parametrize(
    ("sizes", "weights", "taken"),
    [
        ((100, 100), {0: 3.0, 1: 1.0}, (100, 33)),
        ((10, 100), {0: 1.0, 1: 1.0}, (10, 10)),
        ((10, 100), {1: 4.0}, (10, 40)),
        ((100, 50, 20), {0: 0.5, 1: 0.3, 2: 0.2}, (50, 30, 20)),
    ],
)
def test_a_mix_has_the_proportions_of_its_weights(
    sizes: Sequence[int], weights: dict[int, float], taken: Sequence[int]
) -> None:
    sources = [source for source, size in enumerate(sizes) for _ in range(size)]
    chosen = splits.mixed(sources, KEYS[: len(sources)], weights, SEED)
    counted = Counter(source for source, here in zip(sources, chosen, strict=True) if here)
    assert tuple(counted[source] for source in range(len(sizes))) == taken


@pytest.fixture(scope="module")
def divided(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Prepared, list[dict[str, Any]]]:
    """Sixty rows of two labels, two of each question, divided by `data.split`."""
    rows = [asked(f"Question {i // 2}?", f"Answer {i}.", label="ab"[i % 20 == 0]) for i in range(60)]
    settings = ["data.split={train: 0.6, validation: 0.2, test: 0.2}"]
    return prepare_rows(model, tmp_path_factory.mktemp("divided"), rows, (), settings), rows


def test_rows_are_divided_and_their_questions_kept_together(divided: tuple[Prepared, list[dict[str, Any]]]) -> None:
    made, rows = divided
    assert {name: counts["records"] for name, counts in made.summary["splits"].items()} == {
        "train": 36,
        "validation": 12,
        "test": 12,
    }
    question = {row["line"]: rows[row["line"] - 1]["messages"][0]["content"] for row in made.ledger}
    assert len({(question[row["line"]], row["split"]) for row in made.ledger}) == 30
    assert made.suspicious == {}


DIVIDED = "data.split={train: 0.5, test: 0.5}"


def test_rows_without_a_group_are_divided_one_by_one(model: Path, tmp_path: Path) -> None:
    """And those of one group stay together, by the name that data.columns gives its column."""
    without = ({"by": None}, {}, {"by": ""})
    rows = [asked(f"Question {i}?", f"Answer {i}.", **without[i % 3]) for i in range(90)]
    rows += [asked(f"Another {i}?", f"Answer {i}.", by="Ann") for i in range(10)]
    settings = [DIVIDED, "data.group=author", "data.columns={author: by}"]
    made = prepare_rows(model, tmp_path, rows, (), settings)
    alone = Counter(row["split"] for row in made.ledger if row["line"] <= 90)
    assert min(alone["train"], alone["test"]) > 25
    assert len({row["split"] for row in made.ledger if row["line"] > 90}) == 1


def test_a_group_that_is_no_column_is_refused(model: Path, tmp_path: Path) -> None:
    rows = [asked(f"Question {i}?", f"Answer {i}.", author="Ann") for i in range(3)]
    with pytest.raises(DataError, match=r"data\.group=auther: no row has a value there; there are: author, messages"):
        prepare_rows(
            model, tmp_path, rows, HELD_OUT, ["data.group=auther", "data.split={train: 0.5, test: 0.5}", "data.test=[]"]
        )


def test_two_files_are_mixed_and_the_rest_is_in_the_ledger(model: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(asked(f"Is {name} {i}?", f"It is {i}.") for i in range(20)))
    how = recipe(model, {"train": [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]})
    one, two = how.data.train
    mixed = how.data.model_copy(update={"train": (one, two.model_copy(update={"weight": 0.25}))})
    made = prepare(how.model_copy(update={"data": mixed}), tmp_path / "data")
    kept = Counter(Path(row["source"]).stem for row in made.ledger if row["status"] == "trained")
    assert kept == {"one": 20, "two": 5}
    assert made.summary["dropped"] == {"mix": 15}


def test_training_rows_that_are_held_out_are_dropped_if_wanted(model: Path, tmp_path: Path) -> None:
    again = asked(HELD_OUT[0]["messages"][0]["content"].upper(), "Saturn, it is said.")
    made = prepare_rows(model, tmp_path, [*GOOD, again], HELD_OUT, ["data.clean.overlap=drop"])
    assert made.suspicious == {}
    [dropped] = [row for row in made.ledger if row["status"] == "dropped"]
    assert dropped["line"] == len(GOOD) + 1
    assert dropped["reason"].startswith("has the prompt of the held-out") and dropped["reason"].endswith("test.jsonl:1")


# --- lengths ------------------------------------------------------------------------------------------------------------


@given(st.integers(2, 200), st.integers(2, 64))
def test_pieces_learn_every_token_once(length: int, most: int) -> None:
    ids = list(range(length))
    made = list(pieces(EncodedRow(ids, [IGNORED, *ids[1:]], start=1), most))
    assert [label for piece in made for label in piece.labels if label != IGNORED] == ids[1:]
    for piece in made:
        assert len(piece.input_ids) == len(piece.labels) <= most and piece.labels[0] == IGNORED
        assert piece.input_ids[1:] == piece.labels[1:]


def test_a_long_text_is_several_parts_in_the_ledger(model: Path, tmp_path: Path) -> None:
    text = "It was a dark and stormy night; the rain fell in torrents. " * 5
    made = prepare_rows(model, tmp_path, [{"text": text}], HELD_OUT, ["data.max_length=128", "data.too_long=split"])
    assert [row["part"] for row in made.ledger if row["split"] == "train"] == [0, 1, 2]
    assert "".join(texts(made.rows(), learnt=True)) == text[1:] + "<|im_end|>"
    assert made.summary["splits"]["train"]["records"] == 1 and made.summary["splits"]["train"]["rows"] == 3


@pytest.mark.parametrize("family", ["llama2", "gemma"])
def test_pieces_after_the_first_need_no_beginning(family: str, tmp_path: Path) -> None:
    rows = [*GOOD, {"text": "It was a dark and stormy night; the rain fell in torrents. " * 5}]
    settings = ["data.max_length=128", "data.too_long=split"]
    made = prepare_rows(build(FAMILIES[family], tmp_path / "model"), tmp_path / "made", rows, HELD_OUT, settings)
    assert made.suspicious == {} and [row["part"] for row in made.ledger if row["line"] == len(rows)] == [0, 1, 2]


def test_a_first_piece_without_its_beginning_is_found(tmp_path: Path) -> None:
    reader = renderer(tokenizer_of(FAMILIES["llama2"]))
    facts, ids = of_rows.facts(reader, 500), list(range(100, 300))
    found = [
        dict(of_rows.examine(reader, facts, piece, "completion", closely=True))
        for piece in pieces(EncodedRow(ids, [IGNORED, *ids[1:]], start=1, whole_tokens=len(ids)), 128)
    ]
    assert [row.get("bos") for row in found] == ["begins with none", None]


def test_a_cut_prompt_keeps_its_system_turn_and_loses_the_oldest(model: Path, tmp_path: Path) -> None:
    made = prepare_rows(model, tmp_path, [SEVERAL], HELD_OUT, ["data.max_length=192", "data.too_long=truncate_prompt"])
    [text] = texts(made.rows())
    assert "Be kind." in text and "long story" not in text
    assert text.endswith("A short one, then?<|im_end|>\n<|im_start|>assistant\nOnce there was a fox.<|im_end|>")
    [row] = [row for row in made.ledger if row["split"] == "train"]
    whole = prepare_rows(model, tmp_path / "whole", [SEVERAL], HELD_OUT)
    assert row["tokens"] + row["truncated_by"] == len(whole.rows()[0]["input_ids"])


def test_a_cut_prompt_learns_no_turn_twice(tmp_path: Path) -> None:
    """A turn that reads differently at the end has a row of its own; cut, that learns no turn that the other row learns."""
    thoughtful = FAMILIES["qwen3"].chat_template.replace(
        "loop.last or message.reasoning_content", "message.reasoning_content"
    )
    model = build(replace(FAMILIES["qwen3"], template=thoughtful), tmp_path / "model")
    turns = [*LONG["messages"], *ANSWERS["messages"]]
    turns[5] = turns[5] | {"reasoning_content": "hm"}
    settings = ["data.loss=assistant", "data.max_length=224", "data.too_long=truncate_prompt"]
    made = prepare_rows(model, tmp_path / "made", [{"messages": turns}], HELD_OUT, settings)
    assert made.check("prompt_cut")["found"] == 2
    learnt = [re.findall(r"No|First|Second|Third", text) for text in texts(made.rows(), learnt=True)]
    assert learnt == [["First", "Third"], ["Second"]]


@pytest.mark.parametrize("too_long", ["drop", "truncate_prompt", "truncate_completion"])
def test_rows_that_are_too_long_are_among_the_lengths(too_long: str, model: Path, tmp_path: Path) -> None:
    """That is where one looks to choose data.max_length; among the rows and tokens that are used they are not."""
    whole = prepare_rows(model, tmp_path / "whole", [*GOOD, LONG], HELD_OUT)
    settings = ["data.max_length=128", f"data.too_long={too_long}"]
    made = prepare_rows(model, tmp_path / "made", [*GOOD, LONG], HELD_OUT, settings)
    assert made.summary["lengths"] == whole.summary["lengths"] and made.summary["dropped"] == {"length": 1}
    train = made.summary["splits"]["train"]
    assert train["rows"] == len(GOOD) and train["tokens"] == sum(len(row["input_ids"]) for row in made.rows())


def test_a_cut_answer_keeps_its_beginning(model: Path, tmp_path: Path) -> None:
    rows = [asked("Tell me!", "once " * 50)]
    made = prepare_rows(model, tmp_path, rows, HELD_OUT, ["data.max_length=128", "data.too_long=truncate_completion"])
    [row] = made.rows()
    assert len(row["input_ids"]) == 128 and texts([row], learnt=True)[0].startswith("once once")


# --- conversations ------------------------------------------------------------------------------------------------------

ANSWERS = talk(
    ("user", "a?"),
    ("assistant", "First."),
    ("user", "b?"),
    ("assistant", "Second."),
    ("user", "c?"),
    ("assistant", "Third."),
)


@pytest.mark.parametrize(
    ("loss", "marks", "learnt"),
    [
        ("completion", (None, None, None), "Third."),
        ("assistant", (None, None, None), "First.|Second.|Third."),
        ("completion", (1, None, None), "First.|Third."),
        ("assistant", (None, 0, None), "First.|Third."),
        ("assistant", (1, 0, 0), "First."),
        ("completion", (0, 1, 0), "Second."),
    ],
)
def test_a_record_may_say_which_turns_are_learnt(
    loss: str, marks: Sequence[int | None], learnt: str, model: Path, tmp_path: Path
) -> None:
    turns = [dict(turn) for turn in ANSWERS["messages"]]
    for turn, mark in zip(turns[1::2], marks, strict=True):
        turn["weight"] = mark
    made = prepare_rows(model, tmp_path, [{"messages": turns}], HELD_OUT, [f"data.loss={loss}"])
    assert made.suspicious == {}
    assert texts(made.rows(), learnt=True) == ["".join(f"{text}<|im_end|>" for text in learnt.split("|"))]


def test_each_unstable_turn_has_a_row_with_its_own_prompt(thinking: Path, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(FAMILIES["qwen3"])
    made = prepare_rows(thinking, tmp_path, [*GOOD, THINKING], HELD_OUT, ["data.loss=assistant"])
    ends = [row for row in made.rows() if row["place"].endswith(f":{len(GOOD) + 1}")]
    assert len(ends) == 2
    for row, last in zip(ends, (3, 1), strict=True):
        prompt = tokenizer.apply_chat_template(
            THINKING["messages"][:last], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert row["input_ids"][: row["start"]] == prompt
        assert "<think>" in texts([row], learnt=True)[0]
    assert [row["part"] for row in made.ledger if row["line"] == len(GOOD) + 1 and row["split"] == "train"] == [0, 1]


def test_held_out_conversations_are_scored_on_their_last_turn(thinking: Path, tmp_path: Path) -> None:
    made = prepare_rows(thinking, tmp_path, GOOD, [THINKING], ["data.loss=assistant"])
    fates = [(row["part"], row["status"]) for row in made.ledger if row["split"] == "test"]
    assert fates == [(0, "held_out"), (1, "dropped")]
    assert made.summary["dropped"] == {"earlier_turn": 1}


@pytest.mark.parametrize("family", ["mistral", "deepseek", "qwen3", "llama3", "chatml"])
def test_an_answer_that_only_calls_is_learnt_as_the_template_writes_it(family: str, tmp_path: Path) -> None:
    """The special tokens of the call are the template's, not text that spells them."""
    row = {"messages": [{"role": "user", "content": "Look!"}, calls("look")], "tools": [TOOL]}
    made = prepare_rows(build(FAMILIES[family], tmp_path / "model"), tmp_path / "made", [*GOOD, row], HELD_OUT)
    assert made.suspicious == {}
    assert "look" in made.rows()[-1]["answer"]


@pytest.mark.parametrize("answer", ["10 k\u2126.", "Cafe\u0301.", "\u0958\u0932\u092e", "\u212bngstr\u00f6m"])
def test_an_answer_that_the_tokenizer_composes_is_learnt_as_it_gives_it_back(
    answer: str, thinking: Path, tmp_path: Path
) -> None:
    made = prepare_rows(thinking, tmp_path, [*GOOD, asked("How much?", answer)], HELD_OUT)
    assert made.suspicious == {}


def test_a_decoder_that_writes_a_space_for_a_block_is_no_fault_of_the_mask() -> None:
    from tokenizers import decoders

    tokenizer = tokenizer_of(FAMILIES["llama2"])
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("\u2581", " ")])
    reader = renderer(tokenizer)
    facts, talked = of_rows.facts(reader, len(tokenizer)), asked("A bar?", "\u2581\u2581 or so")
    [encoded] = tokenize(reader, [Conversation(tuple(talked["messages"]))], Data())
    [row] = encoded.rows
    assert not list(of_rows.examine(reader, facts, row, "completion", closely=True))


@pytest.mark.parametrize("result", ['{"sky": "grey"}', "C:\\tmp\nD:\\", 'Der "Bär"\n', "\u0958"])
@pytest.mark.parametrize("ascii_only", [False, True])
def test_a_result_that_the_template_writes_as_json_is_there(result: str, ascii_only: bool, tmp_path: Path) -> None:
    """As Llama 3.1's template does; one that writes something else is found."""
    llama = FAMILIES["llama3"].chat_template
    how = f"(message.content | tojson(ensure_ascii={ascii_only}))"
    turns = [{"role": "user", "content": "Look!"}, calls("look"), {"role": "tool", "content": result}]
    row = {"messages": [*turns, {"role": "assistant", "content": "Grey."}], "tools": [TOOL]}
    for number, (written, found) in enumerate([(how, {}), (f"{how}[:-4]", {"content": "fail"})]):
        template = llama.replace(
            "message.content | trim", f"({written} if message.role == 'tool' else message.content)"
        )
        folder = tmp_path / str(number)
        model = build(replace(FAMILIES["llama3"], template=template), folder / "model")
        assert prepare_rows(model, folder / "made", [*GOOD, row], HELD_OUT).suspicious == found


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_prediction_of_what_is_learnt_is_right(family: str, tmp_path: Path) -> None:
    """Whatever the template puts around an answer, and whatever special tokens a call has; another answer is wrong."""
    both = calls("look") | {"content": "I look."}
    held_out = [asked("How much?", "10 k\u2126."), {"messages": [{"role": "user", "content": "Look!"}, both]}]
    made = prepare_rows(build(FAMILIES[family], tmp_path / "model"), tmp_path / "made", GOOD, held_out)
    tokenizer = tokenizer_of(FAMILIES[family])
    for row, reference in zip(
        made.rows("test"),
        measure_held_out.read_held_out(made.folder / "test.parquet", open_task("chat")).references,
        strict=True,
    ):
        prediction = tokenizer.decode(row["input_ids"][row["start"] :], skip_special_tokens=True)
        assert chat.TASK.correct(prediction, reference, Evaluate())
        assert not chat.TASK.correct(prediction[:-3], reference, Evaluate())


# --- what is written ----------------------------------------------------------------------------------------------------

COLUMNS = {
    **dict.fromkeys(("input_ids", "labels"), "list<element: int32>"),
    **dict.fromkeys(("messages", "tools", "variables", "answer", "calls", "reference", "place"), "string"),
    **dict.fromkeys(("start", "pack", "position"), "int32"),
}


@pytest.fixture(scope="module")
def mixed_formats() -> list[Any]:
    """Rows of every format, some of which are dropped."""
    return [
        *GOOD,
        {"prompt": "Now?", "completion": "Later."},
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]},
        {"text": "A text of its own. " * 12},
        tokens(Tiny(), ("<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n", False), ("y<|im_end|>", True)),
        GOOD[1],
        asked("Nothing?", " "),
        asked("A long one? " * 40, "No."),
        b"{broken",
    ]


def test_the_ledger_accounts_for_every_record_and_token(model: Path, mixed_formats: list[Any], tmp_path: Path) -> None:
    settings = ["data.max_length=256", "data.packing=true", "data.clean.malformed=drop"]
    made = prepare_rows(model, tmp_path, mixed_formats, HELD_OUT, settings)
    train = made.summary["splits"]["train"]
    assert (train["records"], train["kept"], train["dropped"]) == (len(mixed_formats), 11, 4)
    assert made.summary["dropped"] == {"duplicate": 1, "empty": 1, "length": 1, "malformed": 1}
    for split in ("train", "test"):
        rows, ledger = (
            made.rows(split),
            [row for row in made.ledger if row["split"] == split and row["status"] != "dropped"],
        )
        assert [row["row"] for row in ledger] == list(range(len(rows)))
        assert [f"{row['source']}:{row['line']}" for row in ledger] == [row["place"] for row in rows]
        assert [row["tokens"] for row in ledger] == [len(row["input_ids"]) for row in rows]
        assert [row["labelled_tokens"] for row in ledger] == [
            sum(label != IGNORED for label in row["labels"]) for row in rows
        ]
        assert [(row["pack"], row["position"]) for row in ledger] == [(row["pack"], row["position"]) for row in rows]
    assert all(row["reason"] for row in made.ledger if row["status"] == "dropped")
    assert made.summary["budget"]["real"] == train["tokens"] == sum(len(row["input_ids"]) for row in made.rows())
    assert made.summary["budget"]["labelled"] == train["labelled_tokens"]


def test_the_columns_of_a_split(model: Path, mixed_formats: list[Any], tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    made = prepare_rows(model, tmp_path, mixed_formats, (), ["data.max_length=256", "data.clean.malformed=drop"])
    for split in recipe_schema.SPLITS:
        schema = pq.read_schema(made.folder / f"{split}.parquet")
        assert {field.name: str(field.type) for field in schema} == COLUMNS
    assert not list(made.folder.glob(".*"))


@pytest.mark.slow
def test_several_processes_give_what_one_gives(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [*(asked(f"What is {i} and {i}?", f"It is {2 * i}.") for i in range(40)), asked("", "x"), *GOOD]
    monkeypatch.setattr(data_prepare, "CHUNK", 8)

    def written(cores: int, alone: int) -> list[Any]:
        found = replace(device.detect(), cores=cores)
        monkeypatch.setattr("qkit.data.stage.detect", lambda: found)
        monkeypatch.setattr(data_prepare, "ALONE", alone)
        made = prepare(recipe(model, {"train": [tmp_path / "train.jsonl"]}), tmp_path / f"with-{cores}")
        return [made.rows(), made.ledger, made.summary]

    (tmp_path / "train.jsonl").write_bytes(lines(rows))
    assert written(cores=2, alone=0) == written(cores=1, alone=100)


def test_line_ends_that_the_template_writes_itself_are_not_lost(thinking: Path, tmp_path: Path) -> None:
    """Qwen's template trims thinking and puts it on lines of its own: what is learnt is what the row says."""
    said = {"role": "assistant", "content": "So.", "reasoning_content": "\nBecause.\n"}
    made = prepare_rows(thinking, tmp_path, [{"messages": [{"role": "user", "content": "Why?"}, said]}, *GOOD])
    assert "content" not in made.suspicious
    learnt = [
        token
        for token, label in zip(made.rows()[0]["input_ids"], made.rows()[0]["labels"], strict=True)
        if label != IGNORED
    ]
    assert tokenizer_of(FAMILIES["qwen3"]).decode(learnt) == "<think>\nBecause.\n</think>\n\nSo.<|im_end|>"
