"""The section `train` of a recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from qkit.core.errors import nearest
from qkit.recipe._rules import as_number
from qkit.recipe.section import Pattern, Positive, Section

TRACKERS = (  # that transformers has a callback for
    "azure_ml",
    "clearml",
    "codecarbon",
    "comet_ml",
    "dagshub",
    "dvclive",
    "flyte",
    "kubeflow",
    "mlflow",
    "neptune",
    "swanlab",
    "tensorboard",
    "trackio",
    "wandb",
)


def _whole_or_share(value: float) -> int | float:
    """Reject fractions of a step: transformers would truncate 2.5 to 2."""
    if value >= 1 and value != int(value):
        raise PydanticCustomError("steps", "must be a whole number of steps, or a share below 1")
    return int(value) if value >= 1 or not value else value


def _steps_or_epochs(value: int) -> int:
    if value == 0:
        raise PydanticCustomError("steps", "0 steps train nothing; remove it to use train.num_train_epochs")
    return value


def _tracker(name: str) -> str:
    if name not in TRACKERS:
        known = {"near": nearest(name, TRACKERS), "known": ", ".join(TRACKERS)}
        raise PydanticCustomError("tracker", "unknown to transformers{near}; it has {known}", known)
    return name


def _one_or_several(value: Any) -> Any:
    """One tracker may stand without a list; transformers writes no tracker as none."""
    return value if not isinstance(value, str) else () if value == "none" else (value,)


def _no_is_a_word(value: object) -> object:
    """YAML reads an unquoted no as false."""
    return "no" if value is False else value


def _numbers(value: dict[str, Any]) -> dict[str, Any]:
    """The entries with numbers as numbers: YAML reads 1e-5, without a point, as a text."""
    return {name: as_number(entry) if isinstance(entry, str) else entry for name, entry in value.items()}


Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_min_lr",
    "cosine_with_restarts",
    "constant",
    "constant_with_warmup",
    "polynomial",
    "inverse_sqrt",
    "warmup_stable_decay",
    "reduce_lr_on_plateau",
]


class Train(Section):
    """trl.SFTConfig."""

    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    embedding_learning_rate: Annotated[float, Field(gt=0)] | None = Field(
        None, description="of embeddings and language-model head, where they are trained; default: train.learning_rate"
    )
    lr_scheduler_type: Schedule = "cosine"
    lr_scheduler_kwargs: Annotated[dict[str, Any], AfterValidator(_numbers)] = Field(
        default_factory=dict, description="what the schedule needs beside the warm-up, such as min_lr_rate"
    )
    warmup_steps: Annotated[int | float, Field(ge=0), AfterValidator(_whole_or_share)] = Field(
        0, description="steps of linear warm-up; below 1, a share of all steps; the first step has a rate above 0"
    )
    max_steps: Annotated[int, Field(ge=-1), AfterValidator(_steps_or_epochs)] = Field(
        -1, description="-1: determined by train.num_train_epochs"
    )
    num_train_epochs: Annotated[float, Field(gt=0)] = 1.0
    gradient_accumulation_steps: Positive = 1
    gradient_checkpointing: bool | Literal["auto"] = Field(
        "auto",
        description="auto: off if the plan then fits the device, otherwise on; a resumed run keeps the decision",
    )
    activation_offloading: bool = Field(False, description="keep activations for the backward pass in host memory")
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    optim: str = "adamw_torch"
    optim_args: Annotated[str, Field(pattern=r"^[^=,]+=[^=,]+(,[^=,]+=[^=,]+)*$")] | None = Field(
        None, description="what only this optimizer has, such as momentum=0.9,nesterov=true"
    )
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    bf16: bool = Field(True, description="compute in bf16 where that changes little (autocast)")
    trainable: tuple[Pattern, ...] = Field(
        (),
        description="with method=full: regular expressions, found in the names of the parameters that are trained; default: all",
    )
    logging_steps: Positive = 1
    save_steps: Positive = 50
    save_total_limit: Positive = 1
    report_to: Annotated[tuple[Annotated[str, AfterValidator(_tracker)], ...], BeforeValidator(_one_or_several)] = (
        Field(
            (), description="experiment trackers that receive recipe, figures and scores, such as [tensorboard, wandb]"
        )
    )
    run_name: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="of the run in the trackers; default: the name of the run directory"
    )
    neftune_noise_alpha: Annotated[float, Field(gt=0)] | None = Field(
        None, description="size of the noise on embeddings in training (NEFTune), such as 5"
    )
    label_smoothing_factor: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="of conversations; tasks with labels have loss.label_smoothing"
    )
    loss_type: Literal["nll", "dft"] = Field(
        "nll", description="of conversations; dft: each token's loss times its probability (dynamic fine-tuning)"
    )
    eval_strategy: Annotated[Literal["auto", "no", "steps", "epoch"], BeforeValidator(_no_is_a_word)] = Field(
        "auto",
        description="when training evaluates the validation rows; auto: every train.eval_steps if that is set, else after each epoch",
    )
    eval_steps: Annotated[int | float, Field(gt=0), AfterValidator(_whole_or_share)] | None = Field(
        None, description="steps between two evaluations; below 1, a share of all steps"
    )
    eval_on_start: bool = Field(False, description="also evaluate before the first step")
    eval_rows: Positive | None = Field(
        None, description="validation rows of an evaluation, drawn from each source by the seed; default: all"
    )
    eval_score_rows: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="validation rows of which an evaluation computes the task's metric as well; default: as many as of the loss, "
        "or none if the model generates text",
    )
    metric_for_best_model: str = Field(
        "loss",
        description="what tells the best step: loss, loss/SOURCE, score, or a figure of the task, such as f1_macro",
    )
    load_best_model_at_end: bool | None = Field(
        None, description="keep what was trained at the best step, not at the last; default: with early stopping"
    )
    early_stopping_patience: Positive | None = Field(
        None, description="stop after this many evaluations in a row that are no better than the best"
    )
    early_stopping_threshold: Annotated[float, Field(ge=0)] = Field(
        0.0, description="by how much an evaluation must be better, to count as better"
    )

    @property
    def keeps_best(self) -> bool:
        """Whether the result is the model of the best step."""
        if self.load_best_model_at_end is None:
            return self.early_stopping_patience is not None
        return self.load_best_model_at_end
