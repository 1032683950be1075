"""Every optimizer that transformers names: what it keeps in memory, what it takes, which package has it, and why one cannot be used.

What memory that is, plan/_optimizer_state.py says in bytes; tests/train/test_optimizers.py measures it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from qkit.core.errors import nearest, short
from qkit.recipe._rules import ABOVE_0, AT_LEAST_0, INSIDE, SHARE, Rule, as_number, is_number, one_of, whole

if TYPE_CHECKING:
    from qkit.recipe.training import Train

TRUTH = one_of("true", "false")
ONLY_TRUE = one_of("true")  # transformers reads any word as true
Layout = Literal["fp32", "blocks", "factored", "torchao-8bit", "torchao-4bit"]


@dataclass(frozen=True)
class Package:
    """What has an optimizer: its name for pip, and that of its module."""

    pip: str
    module: str


@dataclass(frozen=True)
class Optimizer:
    """An optimizer, by its name in transformers.

    `moments`: values that it keeps of each parameter; `layout`: in what form; `step_bytes`: of a tensor's counters. `adam`: the fields
    train.adam_* that it takes; `args`: the entries of train.optim_args. `in_8_bits`: the same one with its state in 8 bits, for a GPU.
    `kernels`: the module whose GPU kernels it uses wherever that is installed. `compiled`: torch compiles its update. `own_schedule`: it needs
    a constant rate. `refused`: why qkit does not train with it; empty if it does.
    """

    moments: int
    layout: Layout = "fp32"
    step_bytes: int = 0
    adam: tuple[str, ...] = ()
    args: Mapping[str, Rule] = field(default_factory=dict)
    package: Package | None = None
    in_8_bits: str = ""
    kernels: str = ""
    compiled: bool = False
    own_schedule: bool = False
    refused: str = ""


BETAS = ("adam_beta1", "adam_beta2")
ADAM = (*BETAS, "adam_epsilon")
BITSANDBYTES, TORCHAO = Package("bitsandbytes", "bitsandbytes"), Package("torchao", "torchao")
SCHEDULEFREE, OPTIMI = Package("schedulefree", "schedulefree"), Package("torch-optimi", "optimi")

LOW_RANK = (
    "its state holds objects that torch does not read back from a checkpoint, so that no killed run could resume, and transformers gives it no "
    "train.weight_decay; to train with less memory use method=lora, or an 8-bit optimizer"
)
LAYERWISE = (
    "it updates each weight in the middle of the backward pass, where gradients are neither accumulated nor clipped nor checked, and no "
    "checkpoint has its state"
)
HARDWARE = "it is for {}, which qkit does not train on"

_ADAMW = Optimizer(
    2, step_bytes=4, adam=ADAM, in_8_bits="paged_adamw_8bit"
)  # torch counts the steps of each tensor in fp32
_OF_BITSANDBYTES = Optimizer(2, adam=ADAM, package=BITSANDBYTES, in_8_bits="paged_adamw_8bit")
_ADEMAMIX = replace(
    _OF_BITSANDBYTES,
    moments=3,
    in_8_bits="paged_ademamix_8bit",
    args={"alpha": ABOVE_0, "beta3": SHARE, "t_alpha": whole(1), "t_beta3": whole(1)},
)
_LION = replace(_OF_BITSANDBYTES, moments=1, adam=BETAS, in_8_bits="paged_lion_8bit")
_RMSPROP = Optimizer(1, package=BITSANDBYTES, in_8_bits="rmsprop_bnb_8bit")
_SCHEDULE_FREE = Optimizer(
    2, adam=ADAM, package=SCHEDULEFREE, own_schedule=True, args={"weight_lr_power": AT_LEAST_0, "r": AT_LEAST_0}
)


def _in_blocks(of: Optimizer) -> Optimizer:
    return replace(of, layout="blocks", in_8_bits="")


def _not(reason: str) -> Optimizer:
    return Optimizer(2, refused=reason)


OPTIMIZERS: Mapping[str, Optimizer] = {
    "adamw_torch": _ADAMW,
    "adamw_torch_fused": _ADAMW,
    "adamw_torch_xla": _not(HARDWARE.format("TPUs (torch_xla)")),
    "adamw_torch_npu_fused": _not(HARDWARE.format("Ascend NPUs (torch_npu)")),
    "adafactor": Optimizer(1, layout="factored"),
    "adamw_anyprecision": _not("it is in torchdistx, which has no release for this torch; use adamw_torch"),
    "adamw_torch_4bit": replace(_ADAMW, layout="torchao-4bit", package=TORCHAO, in_8_bits="", compiled=True),
    "adamw_torch_8bit": replace(_ADAMW, layout="torchao-8bit", package=TORCHAO, in_8_bits="", compiled=True),
    "ademamix": _ADEMAMIX,
    "sgd": Optimizer(0, args={"momentum": SHARE, "dampening": SHARE, "nesterov": TRUTH}),
    "adagrad": Optimizer(1, step_bytes=4, args={"lr_decay": AT_LEAST_0, "eps": ABOVE_0}),
    "adamw_bnb_8bit": _in_blocks(_OF_BITSANDBYTES),
    "adamw_8bit": _in_blocks(_OF_BITSANDBYTES),
    "ademamix_8bit": _in_blocks(_ADEMAMIX),
    "lion_8bit": _in_blocks(_LION),
    "lion_32bit": _LION,
    "paged_adamw_32bit": _OF_BITSANDBYTES,
    "paged_adamw_8bit": _in_blocks(_OF_BITSANDBYTES),
    "paged_ademamix_32bit": _ADEMAMIX,
    "paged_ademamix_8bit": _in_blocks(_ADEMAMIX),
    "paged_lion_32bit": _LION,
    "paged_lion_8bit": _in_blocks(_LION),
    "rmsprop": Optimizer(1, step_bytes=4, args={"momentum": SHARE, "alpha": INSIDE, "eps": ABOVE_0, "centered": TRUTH}),
    "rmsprop_bnb": _RMSPROP,
    "rmsprop_bnb_8bit": _in_blocks(_RMSPROP),
    "rmsprop_bnb_32bit": _RMSPROP,
    "galore_adamw": _not(LOW_RANK),
    "galore_adamw_8bit": _not(LOW_RANK),
    "galore_adafactor": _not(LOW_RANK),
    "galore_adamw_layerwise": _not(LAYERWISE),
    "galore_adamw_8bit_layerwise": _not(LAYERWISE),
    "galore_adafactor_layerwise": _not(LAYERWISE),
    "lomo": _not(LAYERWISE),
    "adalomo": _not(LAYERWISE),
    "grokadamw": _not(
        "it keeps its moments outside the state that a checkpoint stores, so that a resumed run would go another way; use adamw_torch"
    ),
    "schedule_free_radam": _SCHEDULE_FREE,
    "schedule_free_adamw": _SCHEDULE_FREE,
    "schedule_free_sgd": replace(_SCHEDULE_FREE, moments=1, adam=()),
    "apollo_adamw": _not(LOW_RANK),
    "apollo_adamw_layerwise": _not(LAYERWISE),
    "stable_adamw": Optimizer(
        2, step_bytes=4, adam=ADAM, package=OPTIMI, kernels="triton", args={"max_lr": ABOVE_0, "decouple_lr": ONLY_TRUE}
    ),
}
UNKNOWN = Optimizer(2)  # of a later transformers: counted as Adam


def arguments(train: Train) -> dict[str, Any]:
    """train.optim_args by name, numbers as such."""
    pairs = (entry.split("=") for entry in (train.optim_args or "").replace(" ", "").split(",") if entry)
    return {name: as_number(value) for name, value in pairs}


def moments(train: Train) -> int:
    """How many values per parameter the optimizer keeps, with what train.optim_args adds."""
    given = arguments(train)
    added = bool(given.get("momentum")) + (given.get("centered") == "true")
    return OPTIMIZERS.get(train.optim, UNKNOWN).moments + added


def missing(name: str) -> Package | None:
    """The package that an optimizer needs and this environment lacks; None if it lacks none."""
    from importlib.util import find_spec

    package = OPTIMIZERS.get(name, UNKNOWN).package
    return package if package and find_spec(package.module) is None else None


def is_compiled(name: str) -> bool:
    """Whether torch compiles the update of an optimizer."""
    return OPTIMIZERS.get(name, UNKNOWN).compiled


def kernels_of_a_gpu(name: str) -> str:
    """The module that makes an optimizer run on a GPU only, because it is installed; empty if there is none."""
    from importlib.util import find_spec

    module = OPTIMIZERS.get(name, UNKNOWN).kernels
    return module if module and find_spec(module) is not None else ""


def problems(train: Train) -> Iterator[tuple[str, str]]:
    """Why the optimizer cannot be used, or what it does not take, as (key in the section, message). Of one that is not listed here: nothing."""
    optimizer = OPTIMIZERS.get(train.optim)
    if optimizer is None:
        return
    if optimizer.refused:
        yield "optim", f"train.optim={train.optim} cannot be used: {optimizer.refused}"
        return
    if optimizer.own_schedule and train.lr_scheduler_type != "constant":
        yield (
            "lr_scheduler_type",
            f"train.optim={train.optim} averages weights in place of a schedule: set train.lr_scheduler_type=constant (now "
            f"{train.lr_scheduler_type})",
        )
    yield from _idle_fields(train, optimizer)
    yield from _wrong_arguments(train, optimizer)


def _idle_fields(train: Train, optimizer: Optimizer) -> Iterator[tuple[str, str]]:
    for name in ADAM:
        if name not in optimizer.adam and getattr(train, name) != type(train).model_fields[name].default:
            yield (
                name,
                f"train.{name}={getattr(train, name):g} has no effect with train.optim={train.optim}: remove it",
            )


def _wrong_arguments(train: Train, optimizer: Optimizer) -> Iterator[tuple[str, str]]:
    given, rules = arguments(train), optimizer.args
    for name, value in given.items():
        if name not in rules:
            known = f"it has {', '.join(rules)}" if rules else "it has none"
            yield (
                "optim_args",
                f"train.optim_args: train.optim={train.optim} has no entry {short(name)}{nearest(name, [*rules])}; {known}",
            )
        elif not rules[name].allows(value):
            yield "optim_args", f"train.optim_args: {name}={short(value)} must be {rules[name].words}"
    momentum = is_number(given.get("momentum")) and given["momentum"]
    for name in ("nesterov", "dampening"):
        if name in rules and given.get(name) not in (None, 0, "false") and not momentum:
            yield (
                "optim_args",
                f"train.optim_args: {name}={given[name]} has no effect without momentum; set it, or remove {name}",
            )
    if given.get("nesterov") == "true" and given.get("dampening"):
        yield "optim_args", "train.optim_args: nesterov=true takes no dampening; remove one of the two"
