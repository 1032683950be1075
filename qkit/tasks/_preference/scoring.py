"""How a model is measured by pairs: whether it prefers the chosen answers, how far it is from the reference, and how long it answers.

The implicit reward of an answer is how much more likely the trained model finds it than the reference does. The stage `train` records the
reference's log-probabilities of the held-out pairs, so any artifact can be measured. The base is measured by its log-probabilities alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.errors import MissingArtifact
from qkit.plugins.resampling import RowStatistics, Sample, with_intervals
from qkit.plugins.runtime import TokenRow
from qkit.plugins.sections import Figure
from qkit.plugins.task import SCORE, Prediction
from qkit.recipe.schema import WHOLE, Gate, Recipe
from qkit.tasks._conversation.answerer import Answerer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qkit.plugins.runtime import Scores

ALONE = "likelier_chosen"  # the share of pairs whose chosen answer is the likelier one, by the model alone
PLAIN = "plain"  # a setting of predictions: 1 if the reference itself is measured
HELD_OUT_REFERENCE = "reference_test.parquet"  # in the folder of the stage `train`
ANSWERED = 16  # held-out prompts that are answered, for the length of answers and their divergence from the reference
MARGIN, KL, LENGTH = "margin", "kl_to_reference", "answer_tokens"
REWARD_FIGURES = (
    Figure(KL, "mean KL to the reference (nats per token)", "kl", share=False, is_error=True),
    Figure(LENGTH, "mean tokens of an answer", "answer_tokens", share=False),
)
PAIR_FIGURES = (
    Figure(MARGIN, "mean margin of the log-ratios (nats)", "margin", share=False),
    Figure(ALONE, "the chosen answer is the likelier one", "accuracy"),
    *REWARD_FIGURES,
)


def without_score(gates: Mapping[str, Gate]) -> dict[str, Gate]:
    """Gates that leave the score out: an export is compared with the reference in the precision of training, so that its own rounding is part
    of its rewards."""
    return {kind: gate.model_copy(update={"score": None}) for kind, gate in gates.items()}


@dataclass(frozen=True)
class PairTokens(TokenRow):
    """The chosen answer and its prompt, which runtimes score; and `rejected`, the other answer to it."""

    rejected: Sequence[int] = ()

    @property
    def other(self) -> TokenRow:
        """The rejected answer and its prompt."""
        return TokenRow([*self.prompt, *self.rejected], self.start)


def log_probabilities(
    runtime: Scores, rows: Sequence[TokenRow], advance: Callable[[int], None] = lambda _: None
) -> list[tuple[float, float]]:
    """The summed log-probability of each answer, and of the rejected one where a row has one (else 0), in nats."""
    others = [row.other for row in rows if isinstance(row, PairTokens)]
    sums: list[float] = []
    for row in runtime.score([*rows, *others]):
        sums.append(float(row.targets.sum(dtype="float64")))
        if len(sums) <= len(rows):
            advance(1)
    return list(zip(sums[: len(rows)], sums[len(rows) :] if others else [0.0] * len(rows), strict=True))


@dataclass(frozen=True)
class Comparer:
    """`plain`: it is the reference itself that is measured, which prefers nothing to itself. `train`: the folder of the stage `train`."""

    answerer: Answerer
    plain: bool
    train: Path

    def predict(
        self, runtime: Any, rows: Sequence[TokenRow], advance: Callable[[int], None] = lambda _: None
    ) -> list[Prediction]:
        """For each pair, how much more the chosen answer is preferred, in nats; of the first few also what the model answers.

        Raises:
            MissingArtifact: the stage `train` left no log-probabilities of the reference.
        """
        sums = log_probabilities(runtime, rows, advance)
        reference = sums if self.plain else self._reference(runtime, rows)
        answers = self._answers(runtime, rows[:ANSWERED])
        divergences = divergence_from_reference(runtime, answers)
        predictions = []
        for place, (ours, theirs) in enumerate(zip(sums, reference, strict=True)):
            margin = (ours[0] - theirs[0]) - (ours[1] - theirs[1])
            details = {"chosen_log_probability": ours[0], "rejected_log_probability": ours[1]}
            outputs = {MARGIN: margin}
            if isinstance(rows[place], PairTokens):
                outputs[ALONE] = 1.0 if ours[0] > ours[1] else 0.5 if ours[0] == ours[1] else 0.0
            if place < len(answers):
                outputs[LENGTH] = len(answers[place].input_ids) - answers[place].start
            if place < len(divergences):
                outputs[KL] = divergences[place]
            predictions.append(Prediction(f"{margin:+.6g}", details, outputs))
        return predictions

    def _reference(self, runtime: Any, rows: Sequence[TokenRow]) -> list[tuple[float, float]]:
        """The reference's log-probabilities: of a model with an adapter, without it; else as recorded of the held-out pairs."""
        if has_adapter(runtime):
            with runtime.model.disable_adapter():
                return log_probabilities(runtime, rows)
        return recorded(self.train)

    def _answers(self, runtime: Any, rows: Sequence[TokenRow]) -> list[TokenRow]:
        given = self.answerer.predict(runtime, rows)
        return [
            TokenRow([*row.prompt, *one.details["token_ids"]], row.start) for row, one in zip(rows, given, strict=True)
        ]


def plain_or_not(runtime: Any, recipe: Recipe) -> Mapping[str, float]:
    """The setting of predictions that says whether it is the reference itself that is measured."""
    return {} if recipe.method in WHOLE or has_adapter(runtime) else {PLAIN: 1.0}


def has_adapter(runtime: Any) -> bool:
    """Whether it runs the reference with an adapter on it, that can be turned off."""
    return hasattr(getattr(runtime, "model", None), "disable_adapter")


def divergence_from_reference(runtime: Any, answers: Sequence[TokenRow]) -> list[float]:
    """KL(model || reference) in nats per token of each answer, at its tokens; nothing where the runtime holds no reference."""
    from qkit.tasks._distributions import divergence

    if not has_adapter(runtime):
        return []
    means = []
    for row in answers:
        ours = next(iter(runtime.score([row])))
        with runtime.model.disable_adapter():
            theirs = next(iter(runtime.score([row])))
        means.append(float(divergence(ours, theirs).mean()))
    return means


def figures_of_pairs(predictions: Sequence[Prediction], confidence: float, seed: int) -> dict[str, dict[str, float]]:
    """The mean margin, and how often the chosen answer is likelier without any reference; and of the pairs that were answered the mean length
    and divergence; with their intervals."""
    import numpy as np

    figures: dict[str, dict[str, float]] = {}
    for name in (MARGIN, ALONE, KL, LENGTH):
        values = [one.outputs[name] for one in predictions if name in one.outputs]
        if values:
            sample = RowStatistics(np.array([[value, 1.0] for value in values]), _mean(name))
            figures |= with_intervals(sample, confidence, seed)
    return figures


def accuracy(predictions: Sequence[str]) -> Sample:
    """The share of pairs whose chosen answer is preferred."""
    import numpy as np

    return RowStatistics(np.array([[preferred(text), 1.0] for text in predictions]), _mean(SCORE))


@dataclass(frozen=True)
class Ranking:
    """Rewards of good and of bad answers. `wins`: [good, bad], 1 where the good one has the higher reward, one half where they are the same.
    `good`, `bad`: their rows."""

    wins: NDArray[np.float64]
    good: NDArray[np.int64]
    bad: NDArray[np.int64]

    @property
    def rows(self) -> int:
        return len(self.good) + len(self.bad)

    def figures(self, weights: NDArray[np.float64]) -> Mapping[str, NDArray[np.float64]]:
        """The area under the curve of each resample; NaN where it has one kind of answer only."""
        import numpy as np

        good, bad = weights[..., self.good], weights[..., self.bad]
        with np.errstate(invalid="ignore"):
            area = ((good @ self.wins) * bad).sum(-1) / (good.sum(-1) * bad.sum(-1))
        return {SCORE: area}


def ranking(predictions: Sequence[str], references: Sequence[bool]) -> Sample:
    """The rewards of answers, as a sample of rated ones."""
    import numpy as np

    rewards, good = np.array([float(text) for text in predictions]), np.array(references, bool)
    differences = rewards[good][:, None] - rewards[~good][None, :]
    return Ranking((np.sign(differences) + 1) / 2, np.flatnonzero(good), np.flatnonzero(~good))


def preferred(prediction: str) -> float:
    """1 if the chosen answer is preferred, 0 if the rejected one is, and one half where neither is."""
    margin = float(prediction)
    return 0.5 if margin == 0 else float(margin > 0)


def _mean(name: str) -> Callable[[NDArray[np.float64]], Mapping[str, NDArray[np.float64]]]:
    return lambda sums: {name: sums[..., 0] / sums[..., 1]}


def recorded(train: Path) -> list[tuple[float, float]]:
    """The reference's log-probabilities of the held-out pairs, from the folder of the stage `train`."""
    import pyarrow.parquet as pq

    file = train / HELD_OUT_REFERENCE
    if not file.is_file():
        raise MissingArtifact(f"{file} is missing: run the stage `train` again", path=file)
    table = pq.read_table(file)
    return list(zip(table["chosen"].to_pylist(), table["rejected"].to_pylist(), strict=True))
