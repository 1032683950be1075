from __future__ import annotations

from typing import Any

import pytest

from qkit.run import curves


def logged(training: list[float], validation: list[float]) -> list[dict[str, Any]]:
    """A training loss at each of the steps 1, 2 ..., and an evaluation after every second."""
    lines: list[dict[str, Any]] = [{"step": step, "loss": loss} for step, loss in enumerate(training, 1)]
    return [*lines, *({"step": 2 * number, "eval_loss": loss} for number, loss in enumerate(validation, 1))]


def test_the_step_at_which_the_losses_part_is_named() -> None:
    words = curves.gap(logged([3, 3, 2, 2, 1, 1], [2.0, 1.5, 1.9]), False)
    assert "from 1.5 at step 4 to 1.9 at step 6, while the training loss falls from 2 to 1" in words
    assert "load_best_model_at_end" in words
    assert "load_best_model_at_end" not in curves.gap(logged([3, 3, 2, 2, 1, 1], [2.0, 1.5, 1.9]), True)


@pytest.mark.parametrize(
    ("training", "validation"),
    [
        ([3, 3, 2, 2], [2.0, 1.9]),  # both fall
        ([3, 3, 2, 2], [2.0, 2.01]),  # hardly rises
        ([2, 2, 3, 3], [2.0, 2.5]),  # both rise
        ([3, 3], [2.0]),
        ([], [2.0, 3.0]),  # nothing was logged
    ],
)
def test_else_nothing_is_said(training: list[float], validation: list[float]) -> None:
    assert curves.gap(logged(training, validation), False) == ""
