"""The distance of an artifact to what was trained, and the log-probabilities that it is measured against."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qkit import pipeline
from qkit.core.errors import ParityFailed
from qkit.measure import divergence, gates, parity
from qkit.measure import reference as measure_reference
from qkit.measure.held_out import held_out_of
from qkit.measure.parity import Reference
from qkit.plugins.runtime import RowScores
from qkit.plugins.task import open_task
from qkit.recipe.load import load
from qkit.run.directory import Run

GATES = open_task("chat").GATES


def _scores(seed: int, near: RowScores | None = None, step: float = 0.0) -> RowScores:
    """Random log-probabilities over 40 tokens at 7 places; or those of another, a random step away."""
    logits = np.random.default_rng(seed).normal(size=(7, 40)).astype("f4")
    if near is not None and near.full is not None:
        logits = near.full + step * logits
    full = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return RowScores(full[:, 0], full.argmax(1), full=full)


def test_an_artifact_near_the_base_has_lost_the_fine_tune() -> None:
    reference = Reference(tuple(_scores(n) for n in range(4)), tuple(_scores(n) for n in range(10, 12)))
    near_reference = parity.measure(reference, [_scores(90 + n, reference.scores[n], 0.05) for n in range(4)])
    near_base = parity.measure(reference, [_scores(90 + n, reference.base[n % 2], 0.05) for n in range(4)])
    assert near_reference.kl_mean < 0.01 < near_base.kl_mean
    assert not near_reference.lost and near_base.lost
    assert near_reference.rows == 4 and near_reference.tokens == 28
    assert near_reference.max_difference is not None and near_reference.max_difference < 0.5


def test_log_probabilities_that_are_nan_are_an_error() -> None:
    broken = _scores(0)
    assert broken.full is not None
    broken.full[3, 4] = np.nan
    with pytest.raises(ParityFailed, match="returned NaN or infinite log-probabilities") as caught:
        parity.measure(Reference((_scores(0),), ()), [broken])
    assert caught.value.gate == "numbers"


def test_the_live_model_is_asked_once(tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.create(tmp_path / "run", load(tiny_recipe))
    for stage in ("data", "train"):
        pipeline.execute(run, stage)
    rows = held_out_of(run).rows
    first = measure_reference.recorded(run, rows)
    monkeypatch.setattr(measure_reference, "open_runtime", None)
    again = measure_reference.recorded(run, rows)
    for one, other in zip((*first.scores, *first.base), (*again.scores, *again.base), strict=True):
        assert np.array_equal(one.full, other.full) and np.array_equal(one.targets, other.targets)
    assert len(first.scores) == len(first.base) == 4
    apart = parity.measure(first, first.base)
    assert apart.kl_mean > 0 and apart.kl_base == 0 and apart.lost
    assert first.bf16 is not None and 0 < first.bf16.kl_mean < apart.kl_mean and not first.bf16.lost
    assert sum(first.rounding) == pytest.approx(first.bf16.kl_mean * first.bf16.tokens)
    assert again.rounding == first.rounding and again.bf16 == first.bf16
    measure_reference.forget(run)
    assert not (run.root / ".work" / "reference").exists()


def test_as_many_rows_as_fit_the_disk_budget(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.create(tmp_path / "run", load(tiny_recipe))
    for stage in ("data", "train"):
        pipeline.execute(run, stage)
    rows = held_out_of(run).rows
    monkeypatch.setattr(measure_reference, "REFERENCE_BYTES", 10_000)
    recorded = measure_reference.recorded(run, rows)
    assert 0 < len(recorded.scores) < len(rows) and len(recorded.base) == len(recorded.scores)


def _rows_of(reference: Reference, step: float, seed: int) -> list[RowScores]:
    return [_scores(seed + n, row, step) for n, row in enumerate(reference.scores)]


@pytest.mark.parametrize("step", [0.01, 0.1, 0.3])
def test_what_rounding_does_is_no_distance(step: float) -> None:
    """However coarse the rounding: an artifact as far as the reference model in bf16 is not beyond it, one much farther is."""
    exact = Reference(tuple(_scores(n) for n in range(40)), ())
    rounded = parity.measure(exact, _rows_of(exact, step, 1000))
    sums = [
        float(divergence.divergence(a, b).sum()) for a, b in zip(exact.scores, _rows_of(exact, step, 1000), strict=True)
    ]
    reference = Reference(exact.scores, (), tuple(sums), rounded)
    whole = parity.measure(reference, _rows_of(exact, step, 2000))
    merged = parity.measure(reference, _rows_of(exact, step * 2**0.5, 3000))  # its weights were rounded too
    broken = parity.measure(reference, _rows_of(exact, step * 3, 4000))
    assert whole.rounding == pytest.approx(rounded.kl_mean)
    assert whole.excess < 0 and merged.excess < 0 < broken.excess
    assert whole.kl_low < whole.kl_mean < whole.kl_high
    finer = parity.measure(reference, _rows_of(exact, step, 2000), "float16", "float16")
    assert finer.excess > 0  # fp16 has no such excuse


def test_an_interval_draws_whole_rows() -> None:
    """Tokens of one row go together: twenty rows of a hundred equal tokens tell no more than twenty tokens do."""
    values = np.random.default_rng(0).normal(1.0, 1.0, 20)
    low, high = parity.interval(values * 100, np.full(20, 100))
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20**0.5, rel=0.15)
    assert parity.interval(np.array([3.0]), np.array([2])) == (1.5, 1.5)
    uneven = parity.interval(np.array([1.0, 300.0]), np.array([1, 100]))
    assert uneven == (1.0, 3.0)  # the mean per token, not the mean of means


@pytest.mark.parametrize(("rows", "broken"), [(4, 1), (10, 3), (100, 3), (100, 1)])
def test_damage_that_few_rows_show_is_seen(rows: int, broken: int) -> None:
    """Redrawing rows leaves such rows out often enough that the interval begins at nothing; the row itself tells."""
    exact = Reference(tuple(_scores(n) for n in range(rows)), ())
    near = _rows_of(exact, 0.01, 1000)
    sums = tuple(float(divergence.divergence(a, b).sum()) for a, b in zip(exact.scores, near, strict=True))
    reference = Reference(exact.scores, (), sums)
    whole = parity.measure(reference, _rows_of(exact, 0.01, 2000))
    damaged = parity.measure(
        reference, [*(_scores(9000 + n) for n in range(broken)), *_rows_of(exact, 0.01, 2000)[broken:]]
    )
    assert gates.judge(GATES["16-bit"], whole) == []
    assert "kl_row" in [breach.gate for breach in gates.judge(GATES["16-bit"], damaged)]
    assert "kl_row" not in [breach.gate for breach in gates.judge(GATES["quantized"], whole)]
