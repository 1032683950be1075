"""The sections of a recipe that only tasks with labels have."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from qkit.recipe.section import Positive, Section


class Bottleneck(Section):
    """Bottleneck adapters (method houlsby, pfeiffer or parallel): down, a non-linearity, and up again, beside what a block computes."""

    reduction_factor: Positive = Field(16, description="the model's width / the adapter's")
    non_linearity: Literal["relu", "gelu", "swish", "silu", "tanh"] = "relu"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    scaling: Annotated[float, Field(gt=0)] = 1.0


class Loss(Section):
    """The loss of tasks with labels. With gradient accumulation, gradients are those of the whole batch, whatever the loss."""

    name: str = Field(
        "cross_entropy",
        description="cross_entropy, focal; for tag also crf; for multi_label bce; for regress mse, huber; or module:function of your own: "
        "(logits, labels) -> losses, of the shape of the labels",
    )
    class_weights: Literal["balanced"] | dict[str, Annotated[float, Field(gt=0)]] | None = Field(
        None, description="by label; balanced: in inverse proportion to its training rows"
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    gamma: Annotated[float, Field(ge=0)] = Field(2.0, description="of the focal loss: how little easy rows count")
    delta: Annotated[float, Field(gt=0)] = Field(1.0, description="of huber: the error from which on it is linear")


class Head(Section):
    """The new head of a model. Without `pooling`, it is the one that transformers has for this architecture, and loads anywhere."""

    dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="of what the head reads; default: as in the base model's config.json"
    )
    pooling: Literal["cls", "mean", "max", "last"] | None = Field(
        None,
        description="a head of qkit's own, which reads the first token's state, the mean or maximum over tokens, or the last token's",
    )
    layers: Annotated[int, Field(ge=0)] = Field(0, description="hidden layers in that head, before its outputs")
    activation: Literal["gelu", "relu", "silu", "tanh"] = Field("gelu", description="after each of these")


class Layers(Section):
    """Which layers of a model are trained with method=full, when, and at what rate. They are counted from the embeddings upwards."""

    frozen: Annotated[int, Field(ge=0)] = Field(
        0, description="the lowest layers that stay as they are, and with them the embeddings"
    )
    unfreeze_steps: Positive | None = Field(
        None, description="gradual unfreezing: first the head alone; every so many steps the next layer below joins"
    )
    rate_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="rate of a layer / rate of the layer above it; the head has train.learning_rate"
    )
