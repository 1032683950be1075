from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from qkit.measure import divergence, scores
from qkit.plugins.resampling import RowStatistics
from qkit.plugins.runtime import RowScores
from qkit.recipe.schema import Evaluate


def _scores(logits: np.ndarray, top: int | None = None) -> RowScores:
    full = (logits - np.log(np.exp(logits).sum(1, keepdims=True))).astype(np.float32)
    if top is None:
        return RowScores(full[:, 0], full.argmax(1), full=full)
    ids = np.argsort(-full, axis=1)[:, :top]
    return RowScores(full[:, 0], ids[:, 0], top_ids=ids, top=np.take_along_axis(full, ids, axis=1))


def test_divergence_is_kl_and_from_the_top_a_lower_bound() -> None:
    rng = np.random.default_rng(0)
    p, q = rng.normal(size=(7, 50)), rng.normal(size=(7, 50))
    reference, other = _scores(p), _scores(q)
    assert reference.full is not None and other.full is not None
    wanted = (np.exp(reference.full.astype("f8")) * (reference.full - other.full)).sum(1)
    np.testing.assert_allclose(divergence.divergence(reference, other), wanted, rtol=1e-4)
    bounds = [divergence.divergence(reference, _scores(q, top)) for top in (5, 20, 49)]
    for less, more in pairwise(bounds):
        assert (less <= wanted + 1e-4).all() and less.mean() < more.mean()
    np.testing.assert_allclose(bounds[-1], wanted, rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(divergence.divergence(reference, reference), 0, atol=1e-6)


def test_models_of_other_vocabularies_are_compared_over_what_both_have() -> None:
    """Qwen2.5 pads its vocabulary to 151,936 or 152,064 rows, by the model's size."""
    rng = np.random.default_rng(0)
    p, q = rng.normal(size=(7, 50)), rng.normal(size=(7, 50))
    wider = np.concatenate([p, np.full((7, 3), 5.0)], axis=1)
    np.testing.assert_allclose(
        divergence.divergence(_scores(wider), _scores(q)), divergence.divergence(_scores(p), _scores(q)), rtol=1e-4
    )
    np.testing.assert_allclose(
        divergence.divergence(_scores(q), _scores(wider)), divergence.divergence(_scores(q), _scores(p)), rtol=1e-4
    )
    assert divergence.over(_scores(wider), _scores(q)) == "the 50 tokens that both have"
    assert divergence.over(_scores(p), _scores(q)) == "all tokens"


def test_bootstrap_intervals() -> None:
    low, high = scores.bootstrap([True] * 50 + [False] * 50, 0.95, seed=0)
    assert low == pytest.approx(40.2, abs=1.5) and high == pytest.approx(59.8, abs=1.5)  # the normal approximation
    assert scores.bootstrap([False] * 100, 0.95, 0) == (0.0, pytest.approx(3.62, abs=0.01))  # Clopper-Pearson
    assert scores.bootstrap([True] * 100, 0.95, 0) == (pytest.approx(96.38, abs=0.01), 100.0)


def test_rows_that_are_all_right_have_the_exact_bound_whatever_the_score_is_computed_from() -> None:
    sample = RowStatistics(np.ones((8, 2)), lambda sums: {"score": sums[..., 0] / sums[..., 1]})
    score = scores.score(scores.Grades((1.0,) * 8, sample), 0.5, Evaluate(), 0)
    assert (score.score, score.high) == (100, 100) and score.low == pytest.approx(100 * 0.025 ** (1 / 8))


def test_a_paired_gain_is_narrower_than_two_intervals() -> None:
    before = [index % 2 == 0 for index in range(100)]
    after = [right or index % 10 == 1 for index, right in enumerate(before)]
    gain = scores.paired_gain(scores.Grades(tuple(before)), scores.Grades(tuple(after)), 0.95, seed=0)
    assert gain["points"] == 10 and 4 <= gain["low"] < 10 < gain["high"] <= 17


@pytest.mark.parametrize(
    ("lost", "gained", "p_value", "worse"),
    [
        (0, 0, 1.0, False),
        (1, 0, 1.0, False),
        (4, 0, 1 / 8, False),
        (5, 0, 1 / 16, False),
        (6, 0, 1 / 32, True),  # the fewest rows that tell at a level of 0.05
        (0, 6, 1 / 32, False),
        (5, 5, 1.0, False),
        (12, 4, 0.076812744140625, False),
        (13, 3, 0.021270751953125, True),
        (560, 440, 0.00016504987055045303, True),
    ],
)
def test_the_exact_sign_test(lost: int, gained: int, p_value: float, worse: bool) -> None:
    test = scores.SignTest(lost, gained, 1000)
    assert test.p_value == pytest.approx(p_value, rel=1e-3)
    assert test.worse(0.95) is worse
    before = [True] * lost + [False] * (1000 - lost)
    after = [False] * (1000 - gained) + [True] * gained
    assert scores.sign_test(before, after) == test


def test_mean_loss_counts_tokens_not_rows() -> None:
    assert scores.mean_loss([np.array([-1.0, -1.0, -1.0]), np.array([-5.0])]) == 2.0
