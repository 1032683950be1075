"""The distance of an artifact to what was trained, and the log-probabilities that it is measured against."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qkit import live, parity, pipeline
from qkit.errors import ParityFailed
from qkit.live import Live
from qkit.recipe import load
from qkit.run import Run
from qkit.runtime import RowScores
from qkit.scoring import read_held_out


def _scores(seed: int, near: RowScores | None = None, step: float = 0.0) -> RowScores:
    """Random log-probabilities over 40 tokens at 7 places; or those of another, a random step away."""
    logits = np.random.default_rng(seed).normal(size=(7, 40)).astype("f4")
    if near is not None and near.full is not None:
        logits = near.full + step * logits
    full = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return RowScores(full[:, 0], full.argmax(1), full=full)


def test_an_artifact_near_the_base_has_lost_the_fine_tune() -> None:
    reference = Live(tuple(_scores(n) for n in range(4)), tuple(_scores(n) for n in range(10, 12)))
    near_live = parity.measure(reference, [_scores(90 + n, reference.scores[n], 0.05) for n in range(4)])
    near_base = parity.measure(reference, [_scores(90 + n, reference.base[n % 2], 0.05) for n in range(4)])
    assert near_live.kl_mean < 0.01 < near_base.kl_mean
    assert not near_live.lost and near_base.lost
    assert near_live.rows == 4 and near_live.tokens == 28
    assert near_live.max_difference is not None and near_live.max_difference < 0.5


def test_numbers_that_are_none_are_an_error() -> None:
    broken = _scores(0)
    assert broken.full is not None
    broken.full[3, 4] = np.nan
    with pytest.raises(ParityFailed, match="no numbers"):
        parity.measure(Live((_scores(0),), ()), [broken])


def test_the_live_model_is_asked_once(tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.create(tmp_path / "run", load(tiny_recipe))
    for stage in ("data", "train"):
        pipeline.execute(run, stage)
    rows = read_held_out(run.need("data", "test.parquet")).rows
    first = live.recorded(run, rows)
    monkeypatch.setattr(live, "open_runtime", None)
    again = live.recorded(run, rows)
    for one, other in zip((*first.scores, *first.base), (*again.scores, *again.base), strict=True):
        assert np.array_equal(one.full, other.full) and np.array_equal(one.targets, other.targets)
    assert len(first.scores) == len(first.base) == 4
    apart = parity.measure(first, first.base)
    assert apart.kl_mean > 0 and apart.kl_base == 0 and apart.lost
    live.forget(run)
    assert not (run.root / ".work" / "live").exists()


def test_as_many_rows_as_fit_the_disk_budget(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.create(tmp_path / "run", load(tiny_recipe))
    for stage in ("data", "train"):
        pipeline.execute(run, stage)
    rows = read_held_out(run.need("data", "test.parquet")).rows
    monkeypatch.setattr(live, "LIVE_BYTES", 10_000)
    recorded = live.recorded(run, rows)
    assert 0 < len(recorded.scores) < len(rows) and len(recorded.base) == len(recorded.scores)
