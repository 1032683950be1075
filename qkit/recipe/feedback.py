"""The section `feedback` of a recipe: how rated answers are learned from. Only the task `feedback` has it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from qkit.recipe.section import Section


class Feedback(Section):
    """trl.KTOConfig: what it has beside TrainingArguments, as far as it changes the loss."""

    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    beta: Annotated[float, Field(gt=0)] = Field(0.1, description="how dear it is to depart from the reference")
    desirable_weight: Annotated[float, Field(ge=0)] = Field(1.0, description="of the losses of good answers")
    undesirable_weight: Annotated[float, Field(ge=0)] = Field(1.0, description="of the losses of bad answers")
