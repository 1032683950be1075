"""The sections `preference` and `feedback` of a recipe: how pairs of answers are compared, and what rated answers weigh. Each is only for
the task of its name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from qkit.recipe.section import Section

if TYPE_CHECKING:
    Problems = Iterator[tuple[tuple[str | int, ...], str]]

LossType = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]
OF_A_BATCH = ("aot", "aot_unpaired")  # they sort the pairs of a batch: no pair has a loss of its own
# Only in a difference of rewards does the normalizer of an f-divergence cancel.
OF_A_DIFFERENCE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")


def _listed(value: Any) -> Any:
    """One loss may stand without brackets."""
    return (value,) if isinstance(value, str) else value


class Preference(Section):
    """trl.DPOConfig: what it has beside TrainingArguments, as far as it changes the loss."""

    loss_type: Annotated[tuple[LossType, ...], BeforeValidator(_listed), Field(min_length=1)] = Field(
        ("sigmoid",), description="one loss, or several that are added with loss_weights"
    )
    loss_weights: tuple[float, ...] | None = Field(None, description="one for each of loss_type; default: 1 each")
    beta: Annotated[float, Field(gt=0)] = Field(
        0.1, description="how dear it is to depart from the reference; of ipo, its tau"
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="of robust, aot and aot_unpaired: the share of pairs that are the wrong way round; of exo_pair: its epsilon",
    )
    discopop_tau: Annotated[float, Field(gt=0)] = Field(0.05, description="of discopop: the temperature")
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    f_alpha_divergence_coef: float = Field(0.5, description="of alpha_divergence: alpha")
    ld_alpha: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="weight of the tokens of the longer answer beyond the length of the shorter one; default: 1"
    )
    use_weighting: bool = Field(False, description="weight each pair by how likely the model is to say its answers")

    @property
    def weights(self) -> tuple[float, ...]:
        """The weight of each loss."""
        return self.loss_weights or (1.0,) * len(self.loss_type)


class Feedback(Section):
    """trl.KTOConfig: what it has beside TrainingArguments, as far as it changes the loss."""

    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    beta: Annotated[float, Field(gt=0)] = Field(0.1, description="how dear it is to depart from the reference")
    desirable_weight: Annotated[float, Field(ge=0)] = Field(1.0, description="of the losses of good answers")
    undesirable_weight: Annotated[float, Field(ge=0)] = Field(1.0, description="of the losses of bad answers")


def problems(section: Preference) -> Problems:
    """Combinations of values that have no meaning, as (key, message): those that TRL refuses, and values without an effect."""
    losses, where = section.loss_type, "preference"
    shown = ", ".join(losses)
    if section.loss_weights is not None and len(section.loss_weights) != len(losses):
        yield (
            (where, "loss_weights"),
            f"preference.loss_weights has {len(section.loss_weights)} weights for {len(losses)} losses ({shown}): give one for each",
        )
    if "exo_pair" in losses and not section.label_smoothing:
        yield (
            (where, "label_smoothing"),
            "preference.loss_type=exo_pair takes the logarithm of preference.label_smoothing, which is 0: set it, such as 0.001",
        )
    if "robust" in losses and section.label_smoothing >= 0.5:
        yield (
            (where, "label_smoothing"),
            f"preference.label_smoothing={section.label_smoothing:g}: with loss_type=robust, it must be less than 0.5",
        )
    wrong = [loss for loss in losses if loss not in OF_A_DIFFERENCE]
    if section.f_divergence_type != "reverse_kl" and wrong:
        yield (
            (where, "f_divergence_type"),
            f"preference.f_divergence_type={section.f_divergence_type} is not defined for loss_type={wrong[0]}: use reverse_kl, or one of "
            f"{', '.join(OF_A_DIFFERENCE)}",
        )
    if section.use_weighting and {*losses} & {*OF_A_BATCH}:
        yield (
            (where, "use_weighting"),
            f"preference.use_weighting=true weights single pairs, and {' and '.join(OF_A_BATCH)} sort those of a batch: remove it",
        )
    yield from _idle(section)


def _idle(section: Preference) -> Problems:
    """Values that another value leaves without an effect."""
    losses = {*section.loss_type}
    default = Preference()
    readers = (
        ("label_smoothing", f"loss_type={', '.join(SMOOTHED)}", bool(losses & {*SMOOTHED})),
        ("discopop_tau", "loss_type=discopop", "discopop" in losses),
        (
            "f_alpha_divergence_coef",
            "f_divergence_type=alpha_divergence",
            section.f_divergence_type == "alpha_divergence",
        ),
    )
    for name, reader, is_read in readers:
        value = getattr(section, name)
        if value != getattr(default, name) and not is_read:
            yield ("preference", name), f"preference.{name}={value:g} applies to preference.{reader}: remove it"
