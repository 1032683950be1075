"""Bytes of live tensors at the peak of a step, by item of the plan. Memory that an allocator retains does not count.

A dispatch mode sees the tensors that every operator returns, on any device; a weak reference to a tensor's storage tells when
it is freed. Saved-tensor hooks would see what autograd keeps, but neither gradients nor the copies at the peak of a
backward pass. Scratch memory inside an operator is not visible. The mode runs Python for each operator, so it is on for one step only.
"""

from __future__ import annotations

import contextlib
import itertools
import time
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


STANDING = ("weights", "adapter", "gradients", "optimizer")
LINES = (*STANDING, "activations", "logits", "workspace", "batch")
COPIES = ("aten::_to_copy", "aten::clone")
KEEPS_ITS_MASK = "aten::native_dropout"  # of booleans, for the backward pass


@dataclass
class Log:
    """Storages in the order in which they were made: the line and the bytes of each, and when each was made and freed."""

    lines: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    events: list[int] = field(default_factory=list)  # n: storage n was made; ~n: it was freed

    def changes(self) -> Changes:
        """What was made and freed, without which of equal storages it was."""
        steps = ((event, 1) if event >= 0 else (~event, -1) for event in self.events)
        return Changes(tuple((self.lines[number], sign * self.sizes[number]) for number, sign in steps))

    def peak_bytes(self) -> int:
        """The most bytes alive at once."""
        return self.changes().peak_bytes()

    def items(self) -> dict[str, int]:
        """Bytes by line at the moment of the peak; they add up to `peak_bytes`."""
        return self.changes().items()


@dataclass(frozen=True)
class Changes:
    """The line of each storage that is made or freed, in order, and its bytes, which are negative where it is freed."""

    steps: tuple[tuple[str, int], ...]

    def peak_bytes(self) -> int:
        """The most bytes alive at once."""
        return max(self._totals(), default=0)

    def items(self) -> dict[str, int]:
        """Bytes by line at the moment of the peak; they add up to `peak_bytes`."""
        totals = list(self._totals())
        until = totals.index(max(totals)) + 1 if totals else 0
        items = dict.fromkeys(LINES, 0)
        for line, size in self.steps[:until]:
            items[line] += size
        return items

    def extended(self, other: Changes, times: int) -> Changes | None:
        """The difference to `other` added to each size `times` times; None if the two do not make and free the same."""
        if [(line, size > 0) for line, size in self.steps] != [(line, size > 0) for line, size in other.steps]:
            return None
        pairs = zip(self.steps, other.steps, strict=True)
        return Changes(tuple((line, size + times * (more - size)) for (line, size), (_, more) in pairs))

    def _totals(self) -> Iterator[int]:
        return itertools.accumulate(size for _, size in self.steps)


class TensorsAlive:
    """A log of storages made and freed on one kind of device. Each counts once, however many views it has, with all its bytes."""

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self.log = Log()
        self._living: dict[int, tuple[int, weakref.ref[Any]]] = {}  # address of a storage -> its number

    def see(self, tensor: torch.Tensor, line: str) -> None:
        """Count the tensor's storage under `line`, unless it is known already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._living or tensor.device.type != self._device:
            return
        number = len(self.log.lines)
        self.log.lines.append(line)
        self.log.sizes.append(storage.nbytes())
        self.log.events.append(number)
        self._living[key] = (number, weakref.ref(storage, lambda _: self._freed(key)))

    def _freed(self, key: int) -> None:
        self.log.events.append(~self._living.pop(key)[0])

    def mark(self, tensors: Iterable[torch.Tensor], line: str) -> None:
        """Assign tensors to a line, whether they are known or not."""
        for tensor in tensors:
            self.see(tensor, line)
            if entry := self._living.get(tensor.untyped_storage()._cdata):
                self.log.lines[entry[0]] = line

    def line_of(self, tensor: torch.Tensor) -> str | None:
        """The line that a tensor's storage counts under; None if it is unknown."""
        entry = self._living.get(tensor.untyped_storage()._cdata)
        return self.log.lines[entry[0]] if entry else None

    def alive_bytes(self) -> int:
        """Bytes of what is alive now."""
        return sum(self.log.sizes[number] for number, _ in self._living.values())

    def peak_bytes(self) -> int:
        """The most bytes alive at once."""
        return self.log.peak_bytes()

    def items(self) -> dict[str, int]:
        """Bytes by line at the moment of the peak; they add up to `peak_bytes`."""
        return self.log.items()


@contextlib.contextmanager
def watching(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None, vocabulary: int | None = None
) -> Iterator[TensorsAlive]:
    """Log the tensors of what runs inside, beginning with those of the model and the optimizer.

    Args:
        vocabulary: entries of the head; a floating-point tensor whose last dimension is this counts as logits.
    """
    first = next(model.parameters(), None)
    alive = TensorsAlive("cpu" if first is None else first.device.type)
    trained = _mark_standing(alive, model, optimizer)
    hooks = [p.register_post_accumulate_grad_hook(lambda p: alive.mark([p.grad], "gradients")) for p in trained]
    try:
        with _mode(alive, vocabulary):
            yield alive
    finally:
        for hook in hooks:
            hook.remove()
        alive.mark(_state_of(optimizer), "optimizer")


def standing(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, int]:
    """Current bytes by line of the tensors that persist between steps."""
    first = next(model.parameters(), None)
    alive = TensorsAlive("cpu" if first is None else first.device.type)
    _mark_standing(alive, model, optimizer)
    return {line: size for line, size in alive.items().items() if line in STANDING}


def _mark_standing(
    alive: TensorsAlive, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None
) -> list[torch.nn.Parameter]:
    """Log the tensors of model and optimizer; returns the parameters that are trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    alive.mark(frozen_tensors(model), "weights")
    alive.mark(trained, "adapter")
    alive.mark((p.grad for p in trained if p.grad is not None), "gradients")
    alive.mark(_state_of(optimizer), "optimizer")
    return trained


def frozen_tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Parameters that are not trained, with the absmax and code tables of quantized ones, and buffers."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            yield parameter
            yield from _quantization_tensors(getattr(parameter, "quant_state", None))
    yield from model.buffers()


def _quantization_tensors(state: Any) -> Iterator[torch.Tensor]:
    if state is None:
        return
    yield from (state.absmax, state.code)
    if state.nested:
        yield from (state.offset, state.state2.absmax, state.state2.code)


def _state_of(optimizer: torch.optim.Optimizer | None) -> Iterator[torch.Tensor]:
    import torch

    for state in optimizer.state.values() if optimizer else ():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _mode(alive: TensorsAlive, vocabulary: int | None) -> Any:
    """The dispatch mode. Its class is defined in a function, to import torch only when needed."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    def line_of(name: str, tensor: torch.Tensor, inputs: list[torch.Tensor]) -> str:
        if name.startswith("bitsandbytes::dequantize"):
            return "workspace"
        if name in COPIES and (source := alive.line_of(inputs[0])) in ("weights", "adapter", "workspace", "batch"):
            return "batch" if source == "batch" else "workspace"
        if not tensor.is_floating_point():
            return "activations" if name == KEEPS_ITS_MASK else "batch"
        return "logits" if vocabulary is not None and tensor.shape[-1:] == (vocabulary,) else "activations"

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            inputs = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, torch.Tensor)]
            for tensor in inputs:
                alive.see(tensor, "batch")  # existed before the watch, and does not belong to the model
            out = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(out):
                if isinstance(leaf, torch.Tensor):
                    alive.see(leaf, line_of(func.name().partition(".")[0], leaf, inputs))
            return out

    return Mode()


def step_watcher(step: int = 1) -> Any:
    """A trainer callback that watches the optimizer step number `step` (from 0). Its `alive` is None until then.

    The optimizer state exists from step 1 on, so step 1 is the first that shows the peak of a run.
    """
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):
        alive: TensorsAlive | None = None
        seconds = 0.0  # that the step took while it was watched

        def __init__(self) -> None:
            self.step = step
            self._open = contextlib.ExitStack()

        def on_step_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
            if state.global_step == step:
                model, optimizer = parts["model"], parts["optimizer"]
                head = model.get_output_embeddings()  # None for a head on whole texts, whose logits are few
                vocabulary = None if head is None else head.weight.shape[0]
                self._begin = time.perf_counter()
                self.alive = self._open.enter_context(watching(model, optimizer, vocabulary))

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == step + 1:
                self.seconds = time.perf_counter() - self._begin
            self.close()

        def close(self) -> None:
            """Stop watching, also where an error has ended the step."""
            self._open.close()

    return Watcher()
