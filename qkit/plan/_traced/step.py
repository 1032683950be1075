"""Runs a training step, or a forward pass, on fake tensors and logs every tensor that it makes.

For another number of rows the same operations make tensors whose sizes are linear in it, so two traces of a length are enough for all. Of a
model with many equal layers, three short ones are traced: what each layer adds is the same.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from qkit.core import memory_watch
from qkit.core.errors import ModelError, RecipeError
from qkit.core.memory_watch import STANDING, Changes, Log
from qkit.plan._optimizer_state import Tensor, tensors_of
from qkit.plan._traced import depth, kernels, language
from qkit.plan._traced.head import NewHead
from qkit.plan._traced.model import built, layers_of, with_fakes
from qkit.recipe.schema import Recipe

# Rows of the two traces; one row is traced as it is, because torch treats dimensions of 1 in ways of their own.
FEW, MORE = 2, 3
SHALLOW = 2  # layers of the shortest model: a single one would be the first and the last
# Of a recipe, what a trace depends on beside Setting's own fields.
SECTIONS = ("task", "method", "lora", "bottleneck", "peft", "layers", "head", "model", "quantization")
KEY: Any = {**dict.fromkeys(SECTIONS, True), "train": {"trainable"}, "data": {"packing"}}


@dataclass(frozen=True)
class Setting:
    """What a trace depends on, but its batch. `recipe` counts as far as `key` says."""

    key: str
    head: NewHead
    gpu: bool
    bf16: bool
    checkpointing: bool
    accumulated: bool  # whether gradients of an earlier micro-batch exist
    trains: bool  # a training step; else a forward pass without gradients
    labelled: int | None  # tokens of a row with a loss, of a language model; None: the model has a new head
    recipe: Recipe = field(compare=False)


def setting_of(
    recipe: Recipe, head: NewHead, gpu: bool, *, trains: bool = True, labelled: int | None = None
) -> Setting:
    """The setting of a recipe's training, or of a forward pass with the same model. `labelled`: as in Setting."""
    train = recipe.train
    return Setting(
        key=recipe.model_dump_json(include=KEY),
        head=head,
        gpu=gpu,
        bf16=train.bf16,
        checkpointing=trains and bool(train.gradient_checkpointing),
        accumulated=trains and train.gradient_accumulation_steps * recipe.micro_batches > 1,
        trains=trains,
        labelled=labelled,
        recipe=recipe,
    )


@dataclass(frozen=True)
class Traced:
    """A pass over one batch. `tensors`: those that are trained; `frozen`: parameters of all others together."""

    log: Changes
    flops: int
    tensors: tuple[Tensor, ...]
    frozen: int
    held: tuple[int, ...]  # bytes of each tensor that is not trained

    @property
    def trained(self) -> tuple[int, ...]:
        """Parameters of each tensor that is trained."""
        return tuple(tensor.count for tensor in self.tensors)

    @property
    def largest_bytes(self) -> int:
        """Bytes of the largest tensor of the model, in fp32 if it is trained."""
        return max((*self.held, *(4 * count for count in self.trained)))

    def line(self, name: str) -> int:
        """Bytes of a standing line, such as `weights`."""
        return self.log.items()[name]

    @property
    def passing_bytes(self) -> int:
        """Bytes at the peak that do not persist between steps."""
        return sum(size for name, size in self.log.items().items() if name not in STANDING)


@functools.lru_cache(maxsize=128)
def traced(setting: Setting, rows: int, length: int) -> Traced:
    """The pass over `rows` of `length` tokens each.

    Raises:
        ModelError: the model computes something that depends on the values of its tensors, or fails otherwise.
    """
    if rows in (1, FEW, MORE):
        return _traced(setting, rows, length)
    few, more = (traced(setting, count, length) for count in (FEW, MORE))
    if (log := few.log.extended(more.log, rows - FEW)) is None:
        return _traced(setting, rows, length)
    flops = few.flops + (rows - FEW) * (more.flops - few.flops)
    return Traced(log, flops, few.tensors, few.frozen, few.held)


def _traced(setting: Setting, rows: int, length: int) -> Traced:
    """The pass of the model: from three models with few of its layers if these are alike, else of all of it."""
    layers = layers_of(setting.recipe, setting.head)
    shallow = setting.recipe.layers.frozen + SHALLOW
    if layers is not None and layers > shallow + 2 and (deep := _deepened(setting, rows, length, shallow, layers)):
        return deep
    return _run(setting, None, rows, length)


def _deepened(setting: Setting, rows: int, length: int, shallow: int, layers: int) -> Traced | None:
    """The pass of a model with `layers`, from those of models with `shallow` and one and two more; None if layers are not alike."""
    try:
        one, two, three = (_run(setting, shallow + more, rows, length) for more in (0, 1, 2))
    except (ModelError, RecipeError, ValueError):  # such as a target that only upper layers have
        return None
    more = layers - shallow
    log = _extended(one.log, two.log, three.log, more)
    tensors = depth.extended(one.tensors, two.tensors, three.tensors, more)
    held = depth.extended(one.held, two.held, three.held, more)
    if log is None or tensors is None or held is None or three.flops - two.flops != two.flops - one.flops:
        return None
    if (tensors, held) != _tensors(setting):  # of all layers: some may be of another kind
        return None
    flops, frozen = (
        first + more * (second - first) for first, second in ((one.flops, two.flops), (one.frozen, two.frozen))
    )
    return Traced(log, flops, tuple(tensors), frozen, tuple(held))


def _extended(one: Changes, two: Changes, three: Changes, layers: int) -> Changes | None:
    """The changes of a model with `layers` more layers than the first of the three."""
    parts = [_parts(log) for log in (one, two, three)]
    if len({len(of_log) for of_log in parts}) > 1:
        return None
    made = [depth.extended(first, second, third, layers) for first, second, third in zip(*parts, strict=True)]
    return None if None in made else Changes(tuple(step for part in made for step in part or ()))


def _parts(log: Changes) -> list[list[tuple[str, int]]]:
    """What is there before the pass, line by line, and then the pass: each has layers of its own."""
    begin = next((place for place, (line, _) in enumerate(log.steps) if line not in STANDING), len(log.steps))
    standing = [list(group) for _, group in itertools.groupby(log.steps[:begin], key=lambda step: step[0])]
    return [*standing, list(log.steps[begin:])]


@functools.lru_cache(maxsize=32)
def _tensors(setting: Setting) -> tuple[list[Tensor], list[int]]:
    """The tensors of the whole model that are trained, and the bytes of each other one."""
    with kernels.read_by_dora():
        model = built(setting.recipe, setting.head)
    held = [p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad]
    return list(tensors_of(model)), held


def _run(setting: Setting, layers: int | None, rows: int, length: int) -> Traced:
    """The pass of the model; with so many of its layers, if not None."""
    with kernels.read_by_dora():
        return _passed(setting, built(setting.recipe, setting.head, layers), rows, length)


def _passed(setting: Setting, model: Any, rows: int, length: int) -> Traced:
    """The pass of a model that was built."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    if setting.checkpointing and model.supports_gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    counter = _counter()
    try:
        # Some modules hold tensors that are neither parameters nor buffers; these are converted when they are used.
        with FakeTensorMode(allow_non_fake_inputs=True):
            log = _log(setting, with_fakes(model), _batch(setting, rows, length), counter).changes()
    except (
        Exception
    ) as error:  # of the model's own code, which may do anything: read a value, or call what has no shapes
        reason = str(error).partition("\n")[0] or type(error).__name__
        message = f"{setting.head.source}: a step on tensors without data is not possible ({reason}), so its memory cannot be planned"
        raise ModelError(message, source=setting.head.source) from error
    parameters = list(model.parameters())
    return Traced(
        log,
        counter.flops,
        tensors_of(model),
        sum(p.numel() for p in parameters if not p.requires_grad),
        tuple(p.numel() * p.element_size() for p in parameters if not p.requires_grad),
    )


def inputs_of(head: NewHead) -> tuple[str, ...]:
    """Ids and mask, and token types if the model tells them apart."""
    types = ("token_type_ids",) if head.settings.get("type_vocab_size", 0) > 1 else ()
    return "input_ids", "attention_mask", *types


def _batch(setting: Setting, rows: int, length: int) -> dict[str, Any]:
    import torch

    if setting.labelled is not None:
        return language.batch(setting.recipe, rows, length)
    return {name: torch.ones(rows, length, dtype=torch.long) for name in inputs_of(setting.head)}


def _log(setting: Setting, model: Any, batch: dict[str, Any], counter: Any) -> Log:
    """The log of the pass, as the trainer or a runtime makes it."""
    import torch

    model.train(setting.trains)
    if setting.accumulated:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
    device = kernels.of_a_gpu(setting.bf16) if setting.gpu else contextlib.nullcontext()
    width = None if setting.labelled is None else model.get_output_embeddings().weight.shape[0]
    watch = memory_watch.watching(model, vocabulary=width)
    with device, watch as alive, counter, torch.set_grad_enabled(setting.trains):
        numbers, count = torch.ones(len(batch["input_ids"]), dtype=torch.long), torch.ones((), dtype=torch.long)
        with torch.autocast("cpu", torch.bfloat16, enabled=setting.bf16):
            if setting.labelled is not None:
                loss = language.loss(model, batch, setting.labelled, tiles=setting.gpu)
            else:
                outputs = list(_heads(model(**batch)))
        if setting.labelled is None:
            loss = sum(_loss(output.float()) for output in outputs)
            del outputs
        if setting.trains:
            torch.autograd.backward(loss / count)  # not the method, inside which no mode is active
        del numbers  # of the rows, which the trainer keeps beside the batch
    return alive.log


def _heads(output: Any) -> Iterator[Any]:
    """The logits: one tensor, or that of the first and that of the last token of an answer."""
    return (value for name, value in output.items() if name.endswith("logits"))


def _loss(logits: Any) -> Any:
    """The sum of the cross-entropies at each position of each row."""
    import torch

    logits = logits.reshape(-1, logits.shape[-1])
    labels = torch.zeros(len(logits), dtype=torch.long)
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none").sum()


def _counter() -> Any:
    """A dispatch mode that adds up FLOPs, and answers what a model asks of the values of a tensor: no, or 1."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    class Counter(TorchDispatchMode):
        flops = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._local_scalar_dense.default:
                return False if args[0].dtype == torch.bool else 1
            out = func(*args, **(kwargs or {}))
            if (count := flop_registry.get(func._overloadpacket)) is not None:
                self.flops += count(*args, **(kwargs or {}), out_val=out)
            return out

    return Counter()
