"""Records as pairs of answers: what is recognized, what is refused, and which clashes of a recipe are named before anything is loaded."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from helpers.tiny_pairs import pair_rows, pair_settings, write_rows
from qkit.core.batching import IGNORED
from qkit.core.errors import RecipeError
from qkit.core.progress import Progress
from qkit.data import stage as data_stage
from qkit.data.inspection import page, screen, view
from qkit.plan import gpus
from qkit.plan.remedies import _changes
from qkit.plugins.checks import Place, SetRow
from qkit.plugins.example import AnswerPair, Reads, RowError
from qkit.plugins.task import open_task
from qkit.recipe.load import from_dict
from qkit.recipe.schema import Data
from qkit.tasks._preference.checks import PairFacts, set_checks

ASKED = {"role": "user", "content": "q"}
GOOD = {"role": "assistant", "content": "good"}
BAD = {"role": "assistant", "content": "bad"}
SYSTEM = {"role": "system", "content": "s"}
TASK = open_task("preference")


def pair(record: dict[str, Any], **section: Any) -> AnswerPair:
    made = TASK.example(record, None, "auto", Data(**section), Reads())
    assert isinstance(made, AnswerPair)
    return made


def turns(record: dict[str, Any], **section: Any) -> tuple[list[Any], list[Any]]:
    made = pair(record, **section)
    return list(made.chosen.messages), list(made.rejected.messages)


def refusal(record: dict[str, Any], **section: Any) -> tuple[str, str]:
    with pytest.raises(RowError) as caught:
        pair(record, **section)
    return caught.value.rule, str(caught.value)


HH = "\n\nHuman: q\n\nAssistant: "


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("pair", {"prompt": "q", "chosen": "good", "rejected": "bad"}),
        ("pair", {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]}),
        ("pair", {"prompt": [ASKED], "chosen": "good", "rejected": [BAD]}),
        ("pair", {"prompt": "q", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}),  # ultrafeedback
        ("pair", {"prompt": [ASKED], "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}),
        ("pair", {"prompt": json.dumps([ASKED]), "chosen": json.dumps([GOOD]), "rejected": json.dumps([BAD])}),
        ("implicit_prompt", {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}),
        ("implicit_prompt", {"chosen": HH + "good", "rejected": HH + "bad"}),
        (
            "implicit_prompt",
            {
                "prompt": None,
                "chosen": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "good"}],
                "rejected": [ASKED, BAD],
            },
        ),
    ],
)
def test_the_forms_of_a_pair(name: str, record: dict[str, Any]) -> None:
    assert TASK.data_format(record, Data()) == name
    if isinstance(record.get("prompt"), str) and record["prompt"].startswith("["):
        record = {**record, "prompt": json.loads(record["prompt"])}
    assert turns(record) == ([ASKED, GOOD], [ASKED, BAD])


def test_columns_system_tools_and_names_that_nothing_reads() -> None:
    record = {"question": "q", "better": "good", "worse": "bad", "score": 3, "system": "s"}
    columns = {"prompt": "question", "chosen": "better", "rejected": "worse"}
    assert turns(record, columns=columns) == ([SYSTEM, ASKED, GOOD], [SYSTEM, ASKED, BAD])
    assert pair(record, columns=columns).unread == ("score",)
    assert turns({"prompt": "q", "chosen": "good", "rejected": "bad"}, system="s")[1] == [SYSTEM, ASKED, BAD]
    offered = {"name": "f", "parameters": {"type": "object", "properties": {}}}
    made = pair({"prompt": "q", "chosen": "good", "rejected": "bad", "tools": [offered]})
    assert made.chosen.tools == made.rejected.tools and made.chosen.tools[0]["function"] == offered
    assert "better" in TASK.unknown_column(Data(columns={"better": "x"}), Reads())
    assert not TASK.unknown_column(Data(columns=columns), Reads())


def test_an_answer_that_is_json_stays_text() -> None:
    record = {"prompt": "q", "chosen": '[{"a": 1}]', "rejected": "bad"}
    assert turns(record)[0][-1] == {"role": "assistant", "content": '[{"a": 1}]'}


def test_reasoning_beside_two_answers_belongs_to_neither() -> None:
    made = pair({"prompt": "q", "chosen": "good", "rejected": "bad", "reasoning": "so"})
    assert made.unread == ("reasoning",) and "reasoning_content" not in made.chosen.messages[-1]


@pytest.mark.parametrize(
    ("record", "rule", "words"),
    [
        ({"prompt": "q", "completion": "a"}, "malformed", "has no column 'chosen'"),
        ({"prompt": "q", "chosen": "a"}, "malformed", "has no column 'rejected'"),
        ({"prompt": "q", "chosen": "same", "rejected": "same"}, "identical", "the same answer"),
        ({"prompt": "q", "chosen": "", "rejected": "b"}, "empty", "chosen is empty"),
        ({"prompt": "q", "chosen": "a", "rejected": None}, "empty", "rejected is empty"),
        ({"prompt": "q", "chosen": "a", "rejected": "  "}, "empty", "rejected: turn 2 (assistant) is empty"),
        ({"chosen": "a", "rejected": "b"}, "prompt", "has no prompt"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "prompt", "has no prompt"),
        ({"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD, ASKED, BAD]}, "prompt", "differ from turn 2 on"),
        (
            {"chosen": [{**ASKED, "content": "other"}, GOOD], "rejected": [ASKED, BAD]},
            "prompt",
            "differ from turn 1 on",
        ),
        ({"prompt": "other", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, "prompt", "are not the prompt"),
        ({"prompt": "q", "chosen": 3, "rejected": "b"}, "malformed", "chosen: completion is neither text nor a list"),
        ({"chosen": [ASKED], "rejected": [ASKED, BAD]}, "roles", "chosen: must end with an assistant message"),
        ({"prompt": "q", "chosen": "a\x00", "rejected": "b"}, "unicode", "chosen: turn 2 (assistant) contains U+0000"),
    ],
)
def test_what_is_no_pair(record: dict[str, Any], rule: str, words: str) -> None:
    assert refusal(record)[0] == rule and words in refusal(record)[1]


def test_the_identity_of_a_pair_has_both_answers() -> None:
    one, turned, other = (
        TASK.identity(pair({"prompt": "q", "chosen": a, "rejected": b}))
        for a, b in (("x", "y"), ("y", "x"), ("x", "z"))
    )
    assert one.question == turned.question == other.question
    assert len({one.content, turned.content, other.content}) == 3


def _rows(*pairs: tuple[str, str, int, int]) -> list[SetRow]:
    return [
        SetRow("train", "q", (), Place("rows.jsonl", line), "pair", PairFacts(*facts))
        for line, facts in enumerate(pairs, start=1)
    ]


def test_pairs_that_are_there_both_ways_round() -> None:
    check = next(set_checks(_rows(("a", "b", 1, 1), ("a", "c", 1, 1), ("b", "a", 1, 1))))
    assert (check.status, check.found) == (
        "warn",
        1,
    ) and "rows.jsonl:3 prefers the answer that rows.jsonl:1" in check.message
    assert next(set_checks(_rows(("a", "b", 1, 1), ("b", "c", 1, 1)))).status == "pass"


@pytest.mark.parametrize(("longer", "status", "share"), [(19, "warn", "86%"), (12, "pass", "55%"), (3, "warn", "14%")])
def test_the_longer_answer(longer: int, status: str, share: str) -> None:
    rows = _rows(*[("a", "b", 9, 4)] * longer, *[("a", "b", 4, 9)] * (22 - longer), ("a", "b", 4, 4))
    check = [*set_checks(rows)][1]
    assert check.status == status and share in check.message and f"in {longer} of 22" in check.message


# --- the stage --------------------------------------------------------------------------------------------------------


def _prepared(tmp_path: Path, tiny_model: Path, rows: list[Any], **data: Any) -> tuple[Path, dict[str, Any]]:
    settings = pair_settings(tiny_model, write_rows(tmp_path / "rows.jsonl", rows))
    settings["data"] |= {"train": [{"source": str(tmp_path / "rows.jsonl")}], "test": [], **data}
    out = tmp_path / "data"
    out.mkdir()
    return out, data_stage.prepare(from_dict(settings, (), "test"), out, Progress())


def test_a_row_has_its_prompt_once_and_both_answers(tmp_path: Path, tiny_model: Path) -> None:
    out, summary = _prepared(tmp_path, tiny_model, pair_rows(3))
    row = pq.read_table(out / "train.parquet").to_pylist()[1]
    tokenizer = TASK.tokenizer(from_dict(pair_settings(tiny_model, tmp_path / "rows.jsonl"), (), "test"))
    assert (
        tokenizer.decode(row["input_ids"][: row["start"]])
        == "<|im_start|>user\nsay b please <|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(row["input_ids"][row["start"] :]) == "bbb<|im_end|>"
    assert tokenizer.decode(row["rejected_ids"]) == "III<|im_end|>"
    assert row["rejected_labels"] == row["rejected_ids"]
    assert row["labels"] == [IGNORED] * row["start"] + row["input_ids"][row["start"] :]
    train = summary["splits"]["train"]
    rows = pq.read_table(out / "train.parquet").to_pylist()
    assert train["tokens"] == sum(len(row["input_ids"]) + len(row["rejected_ids"]) for row in rows)
    scored = TASK.row(row)
    assert list(scored.other.input_ids) == row["input_ids"][: row["start"]] + row["rejected_ids"]


def test_every_record_is_counted(tmp_path: Path, tiny_model: Path) -> None:
    rows = [
        *pair_rows(4),
        pair_rows(1)[0],  # a duplicate
        {"prompt": "q", "chosen": "same", "rejected": "same"},
        {"prompt": "q", "chosen": "", "rejected": "b"},
        {"chosen": "a", "rejected": "b"},
        {"prompt": "long", "chosen": "a" * 200, "rejected": "b"},
        {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
    ]
    out, summary = _prepared(tmp_path, tiny_model, rows)
    assert summary["dropped"] == {"duplicate": 1, "identical": 1, "empty": 1, "prompt": 1, "length": 1}
    assert summary["sources"][0]["formats"] == {"pair": 8, "implicit_prompt": 2}
    checks = {check["name"]: check for check in summary["checks"]}
    for name, line in (("identical", 6), ("empty", 7), ("prompt", 8), ("length", 9)):
        assert checks[name]["status"] == "warn" and [*checks[name]["rows"]] == [
            {"source": str(tmp_path / "rows.jsonl"), "line": line}
        ]
    ledger = pq.read_table(out / "ledger.parquet").to_pylist()
    assert Counter(row["status"] for row in ledger) == {"trained": 5, "dropped": 5}
    assert "the prompt, and both answers" in ledger[8]["reason"]


def test_a_long_prompt_is_cut_alike_on_both_sides(tmp_path: Path, tiny_model: Path) -> None:
    prompt = [ASKED, GOOD, {**ASKED, "content": "q" * 60}, GOOD, {**ASKED, "content": "last"}]
    row = {"prompt": prompt, "chosen": "a" * 30, "rejected": "b" * 10}
    out, summary = _prepared(tmp_path, tiny_model, [row, *pair_rows(2)], max_length=120, too_long="truncate_prompt")
    kept = pq.read_table(out / "train.parquet").to_pylist()[0]
    assert [turn["content"] for turn in json.loads(kept["messages"])] == ["last"]
    assert len(kept["input_ids"]) - kept["start"] == 31 and len(kept["rejected_ids"]) == 11
    assert summary["splits"]["train"]["truncated_tokens"] > 0
    assert {check["name"]: check["status"] for check in summary["checks"]}["prompt_cut"] == "warn"


def test_inspect_shows_both_sides(tmp_path: Path, tiny_model: Path) -> None:
    settings = pair_settings(tiny_model, write_rows(tmp_path / "rows.jsonl", pair_rows(44)))
    inspection = view.inspect(from_dict(settings, (), "test"), Progress())
    row = view.row(inspection, "test", 1)
    assert [*row.titles.values()] == ["prompt", "chosen", "rejected"]
    learnt = "".join(text for text, mask in zip(row.texts, row.loss_mask, strict=True) if mask)
    assert learnt == "bbb<|im_end|>III<|im_end|>"
    drawn = screen.row_screen(row)
    assert "[chosen] bbb<|im_end|>\n[rejected] III<|im_end|>" in drawn.plain  # type: ignore[union-attr]
    page.write(inspection, tmp_path / "page.html")
    assert "[rejected] " in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "the chosen answer is longer in" in json.dumps(screen.to_dict(inspection, None, None))


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data.packing": True}, "data.packing=true is not for task=preference"),
        ({"data.loss": "all"}, "data.loss=all is not for task=preference"),
        ({"data.too_long": "truncate_completion"}, "would cut two answers in different places"),
        ({"preference.loss_type": "dpo"}, "preference.loss_type.0: Input should be 'sigmoid'"),
        ({"preference.loss_weights": [1, 2]}, "has 2 weights for 1 losses"),
        ({"preference.loss_type": "exo_pair"}, "takes the logarithm of preference.label_smoothing"),
        ({"preference.loss_type": "robust", "preference.label_smoothing": 0.5}, "must be less than 0.5"),
        ({"preference.loss_type": "aot", "preference.use_weighting": True}, "sort those of a batch"),
        (
            {"preference.loss_type": "nca_pair", "preference.f_divergence_type": "forward_kl"},
            "is not defined for loss_type=nca_pair",
        ),
        ({"preference.discopop_tau": 0.2}, "applies to preference.loss_type=discopop"),
        ({"preference.label_smoothing": 0.2}, "applies to preference.loss_type=robust"),
        ({"preference.loss_type": "aot", "ledger.losses": True}, "no pair has its own"),
        ({"preference.loss_type": "aot", "micro_batches": 2}, "lower data.batch_tokens instead"),
        ({"method": "full", "quantization.load_in_4bit": False}, "its reference is the base with a LoRA adapter off"),
        ({"lora.init_from": "runs/first"}, "whose reference would lack that adapter: merge it"),
        ({"lora.init_lora_weights": "olora", "quantization.load_in_4bit": False}, "the base must be the reference"),
        ({"train.neftune_noise_alpha": 5}, "changes the loss of supervised training"),
        ({"train.loss_type": "dft"}, "changes the loss of supervised training"),
        ({"data.weight": "w"}, "changes the loss of supervised training"),
        ({"lora.lora_dropout": 0.1}, "a reference that has no dropout"),
        ({"train.activation_offloading": True}, "train.activation_offloading=true is not for"),
        ({"data.train": [{"source": "x.jsonl", "format": "messages"}]}, "has no pairs of answers"),
        ({"task": "chat", "preference.beta": 0.5}, "preference is for task=preference, and not for task=chat"),
        ({"task": "classify", "preference.beta": 0.5}, "preference is for task=preference, and not for task=classify"),
    ],
)
def test_what_makes_no_sense_is_named_before_anything_is_loaded(changes: dict[str, Any], words: str) -> None:
    raw = {"task": "preference", "model": {"source": "org/none"}, "data": {"train": [{"source": "x.jsonl"}]}}
    overrides = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    with pytest.raises(RecipeError) as caught:
        from_dict(raw, overrides, "test")
    assert words in str(caught.value)


def test_no_remedy_for_memory_is_one_that_the_task_has_no_use_for() -> None:
    raw = {"task": "preference", "model": {"source": "org/none"}, "data": {"train": [{"source": "x.jsonl"}]}}
    card = gpus.device("rtx-4090")
    told = {}
    for loss in ("sigmoid", "aot"):
        recipe = from_dict(raw, [f"preference.loss_type={loss}", "data.batch_tokens=8192"], "test")
        told[loss] = {
            text.partition("=")[0]
            for change in _changes(recipe, "train", card)
            for level in change.levels
            for text in level
        }
    assert told["sigmoid"] - told["aot"] == {"micro_batches"} and "train.activation_offloading" not in told["sigmoid"]


def test_the_rate_is_one_for_small_changes() -> None:
    raw = {"task": "preference", "model": {"source": "org/none"}, "data": {"train": [{"source": "x.jsonl"}]}}
    assert from_dict(raw, (), "test").train.learning_rate == 1e-5
    assert from_dict(raw, ["train.learning_rate=1e-3"], "test").train.learning_rate == 1e-3
