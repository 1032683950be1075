"""What a plan is of: the shape of a language model, whose memory is arithmetic, or a model with a new head, which is traced."""

from __future__ import annotations

from qkit.model.config import shape_of
from qkit.model.shape import Shape
from qkit.plan._known import NOTHING, Known
from qkit.plan._traced.head import NewHead, new_head
from qkit.plugins.task import open_task
from qkit.recipe.schema import Recipe

Subject = Shape | NewHead


def subject_of(recipe: Recipe, known: Known = NOTHING) -> Subject:
    """The model of a recipe, with the head of its task.

    Raises:
        ModelError: the model cannot be found, or its shape cannot be determined.
    """
    return shape_of(recipe.model) if open_task(recipe.task).HEAD.generates else new_head(recipe, known)
