"""The losses of pairs, by the names of trl.DPOConfig.loss_type. They see log-probabilities only, so no model is needed to test them.

Notation of the papers: log-ratio = log-probability of an answer under the model - under the reference; beta scales it to an implicit reward.
Reference: TRL's DPOTrainer, in tests/train/test_pairs.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qkit.recipe.preference import LossType, Preference

if TYPE_CHECKING:
    import torch

EXPONENT = 80.0  # the largest whose exponential float32 can hold with room to spare


@dataclass(frozen=True)
class Compared:
    """Some pairs under the model and under the reference: summed log-probabilities [pairs, 2], chosen and rejected, in nats.

    `tokens` [pairs, 2]: labelled tokens of each answer. `plain` [pairs]: the log-probability of the chosen answer with all its tokens at full
    weight. `per_token`: by which the losses per token of `plain` are divided: tokens of chosen answers per pair, in the whole step.
    """

    model: torch.Tensor
    reference: torch.Tensor
    tokens: torch.Tensor
    plain: torch.Tensor
    per_token: torch.Tensor

    @property
    def ratios(self) -> torch.Tensor:
        """Log-ratios [pairs, 2]."""
        return self.model - self.reference


def pair_losses(pairs: Compared, section: Preference) -> torch.Tensor:
    """The loss of each pair, [pairs]: the weighted sum of the recipe's losses."""
    scores = _scores(pairs.ratios, section)
    weighted = [
        weight * LOSSES[name](pairs, scores, section)
        for name, weight in zip(section.loss_type, section.weights, strict=True)
    ]
    total = weighted[0]
    for loss in weighted[1:]:
        total = total + loss
    return total


def _scores(ratios: torch.Tensor, section: Preference) -> torch.Tensor:
    """Log-ratios as the f-divergence of the recipe scores them: f'(ratio), without constants that cancel in a difference."""
    from torch.nn.functional import logsigmoid

    kind, alpha = section.f_divergence_type, section.f_alpha_divergence_coef
    if kind == "forward_kl":
        return 1 - (-ratios).exp()
    if kind == "js_divergence":
        return math.log(2) + logsigmoid(ratios)
    if kind == "alpha_divergence" and abs(alpha - 1) >= 1e-6:  # at 1 it is the reverse KL
        return (((alpha - 1) * ratios).clamp(max=EXPONENT).exp() - 1) / (alpha - 1)
    return ratios


def _difference(scores: torch.Tensor) -> torch.Tensor:
    return scores[:, 0] - scores[:, 1]


def _of_means(pairs: Compared, scores: torch.Tensor) -> torch.Tensor:
    """The difference of scores per token."""
    return _difference(scores / pairs.tokens.clamp(min=1))


def _sigmoid(pairs: Compared, scores: torch.Tensor, section: Preference) -> torch.Tensor:
    """DPO: https://arxiv.org/abs/2305.18290."""
    return _smoothed(_difference(scores), section.beta, 0.0)


def _sigmoid_norm(pairs: Compared, scores: torch.Tensor, section: Preference) -> torch.Tensor:
    """DPO of log-ratios per token."""
    return _smoothed(_of_means(pairs, scores), section.beta, 0.0)


def _hinge(pairs: Compared, scores: torch.Tensor, section: Preference) -> torch.Tensor:
    """SLiC: https://arxiv.org/abs/2305.10425."""
    return (1 - section.beta * _difference(scores)).relu()


def _ipo(pairs: Compared, scores: torch.Tensor, section: Preference) -> torch.Tensor:
    """IPO, of log-ratios per token: https://arxiv.org/abs/2310.12036."""
    return (_of_means(pairs, scores) - 1 / (2 * section.beta)) ** 2


def _exo_pair(pairs: Compared, scores: torch.Tensor, section: Preference) -> torch.Tensor:
    """EXO: https://arxiv.org/abs/2402.00856, equation 16."""
    from torch.nn.functional import logsigmoid

    logits, epsilon = section.beta * _difference(scores), section.label_smoothing
    won, lost = logsigmoid(logits), logsigmoid(-logits)
    return won.exp() * (won - math.log1p(-epsilon)) + lost.exp() * (lost - math.log(epsilon))


def _nca_pair(pairs: Compared, scores: torch.Tensor, section: Preference) -> torch.Tensor:
    """NCA: https://arxiv.org/abs/2402.05369."""
    from torch.nn.functional import logsigmoid

    rewards = section.beta * pairs.ratios
    return -logsigmoid(rewards[:, 0]) - 0.5 * logsigmoid(-rewards).sum(-1)


def _robust(pairs: Compared, scores: torch.Tensor, section: Preference) -> torch.Tensor:
    """DPO of pairs that may be the wrong way round: https://arxiv.org/abs/2403.00409."""
    from torch.nn.functional import logsigmoid

    logits, flipped = section.beta * _difference(scores), section.label_smoothing
    return (flipped * logsigmoid(-logits) - (1 - flipped) * logsigmoid(logits)) / (1 - 2 * flipped)


def _bco_pair(pairs: Compared, scores: torch.Tensor, section: Preference) -> torch.Tensor:
    """BCO without its shift: https://arxiv.org/abs/2404.04656."""
    from torch.nn.functional import logsigmoid

    rewards = section.beta * pairs.ratios
    return -logsigmoid(rewards[:, 0]) - logsigmoid(-rewards[:, 1])


def _sppo_hard(pairs: Compared, scores: torch.Tensor, section: Preference) -> torch.Tensor:
    """SPPO with certain preferences: https://arxiv.org/abs/2405.00675."""
    half = 0.5 / section.beta
    return (pairs.ratios[:, 0] - half) ** 2 + (pairs.ratios[:, 1] + half) ** 2


def _aot(pairs: Compared, scores: torch.Tensor, section: Preference) -> torch.Tensor:
    """AOT: https://arxiv.org/abs/2406.05882. The pairs of the batch, sorted, so that the values are no longer those of the pairs."""
    ours, theirs = _difference(pairs.model), _difference(pairs.reference)
    return _smoothed(ours.sort().values - theirs.sort().values, section.beta, section.label_smoothing)


def _aot_unpaired(pairs: Compared, scores: torch.Tensor, section: Preference) -> torch.Tensor:
    """AOT without pairs."""
    ordered = pairs.ratios.sort(dim=0).values
    return _smoothed(_difference(ordered), section.beta, section.label_smoothing)


def _apo_zero(pairs: Compared, scores: torch.Tensor, section: Preference) -> torch.Tensor:
    """APO for chosen answers better than the model's: https://arxiv.org/abs/2408.06266, equation 7."""
    rewards = section.beta * pairs.ratios
    return 1 - rewards[:, 0].sigmoid() + rewards[:, 1].sigmoid()


def _apo_down(pairs: Compared, scores: torch.Tensor, section: Preference) -> torch.Tensor:
    """APO for chosen answers worse than the model's: equation 8."""
    rewards = section.beta * pairs.ratios
    return rewards[:, 0].sigmoid() + 1 - _difference(rewards).sigmoid()


def _discopop(pairs: Compared, scores: torch.Tensor, section: Preference) -> torch.Tensor:
    """DiscoPOP: https://arxiv.org/abs/2406.08414, equation 5."""
    from torch.nn.functional import logsigmoid

    logits = section.beta * _difference(scores)
    share = (logits / section.discopop_tau).sigmoid()
    return -logsigmoid(logits) * (1 - share) + (-logits).exp() * share


def _sft(pairs: Compared, scores: torch.Tensor, section: Preference) -> torch.Tensor:
    """Cross-entropy of the chosen answers, per token of the step."""
    return -pairs.plain / pairs.per_token


def _smoothed(difference: torch.Tensor, beta: float, smoothing: float) -> torch.Tensor:
    """Cross-entropy of a comparison that is the wrong way round in a share `smoothing` of all cases."""
    from torch.nn.functional import logsigmoid

    loss = -(1 - smoothing) * logsigmoid(beta * difference)
    return loss - smoothing * logsigmoid(-beta * difference) if smoothing else loss


LOSSES: Mapping[LossType, Callable[[Compared, torch.Tensor, Preference], torch.Tensor]] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "robust": _robust,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "sft": _sft,
    "sigmoid_norm": _sigmoid_norm,
}
