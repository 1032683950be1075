"""Records as rated answers: labels in every spelling, what is refused, checks of the whole set, and the score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from helpers.tiny_pairs import pair_settings, write_rows
from qkit.core.errors import RecipeError
from qkit.core.progress import Progress
from qkit.data import stage as data_stage
from qkit.plugins.example import RatedConversation, Reads, RowError
from qkit.plugins.resampling import figures, intervals
from qkit.plugins.task import SCORE, open_task
from qkit.recipe.load import from_dict
from qkit.recipe.schema import Data
from qkit.tasks._preference.scoring import ranking

TASK = open_task("feedback")
ASKED = {"role": "user", "content": "q"}
SAID = {"role": "assistant", "content": "a"}


def rated(record: dict[str, Any], **section: Any) -> RatedConversation:
    made = TASK.example(record, None, "auto", Data(**section), Reads())
    assert isinstance(made, RatedConversation)
    return made


@pytest.mark.parametrize(
    ("label", "good"),
    [(True, True), (False, False), (1, True), (0, False), (1.0, True), ("true", True), ("False", False), ("0", False)],
)
def test_labels_in_every_spelling(label: Any, good: bool) -> None:
    assert rated({"prompt": "q", "completion": "a", "label": label}).desirable is good


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "completion": "a"},
        {"prompt": [ASKED], "completion": [SAID]},
        {"messages": [ASKED, SAID]},
        {"instruction": "q", "output": "a"},
    ],
)
def test_any_conversation_can_be_rated(record: dict[str, Any]) -> None:
    made = rated({**record, "liked": True, "id": 3}, columns={"label": "liked"})
    assert list(made.conversation.messages) == [ASKED, SAID]
    assert made.unread == ("id",) and not TASK.unknown_column(Data(columns={"label": "liked"}), Reads())
    assert TASK.data_format({**record, "label": 1}, Data()) in ("prompt_completion", "messages", "alpaca")


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt": "q", "completion": "a"}, "has no 'label' that says whether its answer is good"),
        ({"prompt": "q", "completion": "a", "label": None}, "has no 'label'"),
        ({"prompt": "q", "completion": "a", "label": "good"}, "label is 'good', where it must be true or false"),
        ({"prompt": "q", "completion": "a", "label": 2}, "label is 2, where"),
        ({"text": "some", "label": True}, "has no prompt and answer that could be rated"),
        ({"label": True}, "it must have messages, or"),
    ],
)
def test_what_is_no_rated_answer(record: dict[str, Any], words: str) -> None:
    with pytest.raises(RowError) as caught:
        rated(record)
    assert words in str(caught.value)


def _prepared(tmp_path: Path, tiny_model: Path, labels: list[bool]) -> tuple[Path, dict[str, dict[str, Any]]]:
    rows = [{"prompt": f"say {number}", "completion": "yes", "label": label} for number, label in enumerate(labels)]
    settings = pair_settings(tiny_model, write_rows(tmp_path / "rows.jsonl", rows)) | {"task": "feedback"}
    settings["data"] |= {"train": [{"source": str(tmp_path / "rows.jsonl")}], "test": []}
    out = tmp_path / "data"
    out.mkdir()
    summary = data_stage.prepare(from_dict(settings, (), "test"), out, Progress())
    return out, {check["name"]: check for check in summary["checks"]}


@pytest.mark.parametrize(
    ("good", "status", "words"),
    [(6, "pass", "6 of 12 answers of data.train are good (50%)"), (12, "fail", "both kinds"), (1, "warn", "(8%)")],
)
def test_both_kinds_are_needed(tmp_path: Path, tiny_model: Path, good: int, status: str, words: str) -> None:
    out, checks = _prepared(tmp_path, tiny_model, [number < good for number in range(12)])
    assert checks["ratings"]["status"] == status and words in checks["ratings"]["message"]
    assert pq.read_table(out / "train.parquet")["desirable"].to_pylist() == [1] * good + [0] * (12 - good)
    assert {"input_ids", "labels", "start"} < {*pq.read_table(out / "train.parquet").column_names}


def test_the_score_is_the_area_under_the_curve() -> None:
    rng = np.random.default_rng(0)
    rewards, good = rng.normal(size=40).round(1), rng.random(40) < 0.4
    texts, references = [f"{reward:+.6g}" for reward in rewards], [bool(one) for one in good]
    pairs = [(a > b) + 0.5 * (a == b) for a in rewards[good] for b in rewards[~good]]
    sample = ranking(texts, references)
    assert figures(sample)[SCORE] == pytest.approx(np.mean(pairs))
    bounds = intervals(sample, 0.95, 0)[SCORE]
    assert 0 <= bounds.low < np.mean(pairs) < bounds.high <= 1
    assert [TASK.correct(text, True, from_section()) for text in ("+1", "-1", "+0")] == [1, 0, 0.5]
    assert TASK.correct("-2", False, from_section()) == 1


def from_section() -> Any:
    return from_dict(_raw(), (), "test").evaluate


def _raw() -> dict[str, Any]:
    return {"task": "feedback", "model": {"source": "org/none"}, "data": {"train": [{"source": "x.jsonl"}]}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"micro_batches": 2}, "compares each answer with the mean of its batch"),
        ({"data.packing": True}, "data.packing=true is not for task=feedback"),
        ({"feedback.desirable_weight": 0, "feedback.undesirable_weight": 0}, "nothing would be learned"),
        ({"preference.beta": 0.5}, "preference is for task=preference, and not for task=feedback"),
        ({"feedback.loss_type": "dpo"}, "feedback.loss_type: Input should be 'kto' or 'apo_zero_unpaired'"),
        ({"task": "chat", "feedback.beta": 0.5}, "feedback is for task=feedback, and not for task=chat"),
    ],
)
def test_what_makes_no_sense_is_named_before_anything_is_loaded(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        from_dict(_raw(), [f"{key}={json.dumps(value)}" for key, value in changes.items()], "test")
    assert words in str(caught.value)
