"""Runs the decoder layers of a model folder on some of the run's own rows, with one layer in memory at a time.

The input of a layer is the output of the layers before it as they are then: with rounded weights, once the caller has put those in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.batching import within_budget
from qkit.tensors.shards import read, shards, tensor_specs

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


PREFIX = "model.layers."
BATCH_TOKENS = 1024  # padded tokens per forward pass


@dataclass(frozen=True)
class Batch:
    """Padded rows: hidden states [rows, width, hidden], and which of them are real [rows, width]."""

    states: Tensor
    real: Tensor


class Layers:
    """A model whose layers are loaded one at a time, in fp32."""

    def __init__(self, folder: Path, rows: Sequence[Sequence[int]]):
        self.folder = folder
        self.model = _empty(folder)
        self.rows = sorted(rows, key=len)

    def walk(self) -> Iterator[Layer]:
        """Yield each layer in turn. Weights that the caller replaces take effect in the layers after it."""
        import torch

        inner = self.model.model
        with torch.no_grad():
            self._load(inner.embed_tokens, "model.embed_tokens.")
            cuts = within_budget(map(len, self.rows), BATCH_TOKENS)
            batches, calls = _enter(inner, [_padded(self.rows[cut.start : cut.stop]) for cut in cuts])
            inner.embed_tokens.to("meta")
        for index, module in enumerate(inner.layers):
            self._load(module, f"{PREFIX}{index}.")
            yield (layer := Layer(index, module, batches, [call[index] for call in calls]))
            batches = layer.forward()
            module.to("meta")

    def _load(self, module: Module, prefix: str) -> None:
        """Load the tensors of a module, whose names in the files begin with `prefix`."""
        names = [prefix + name for name in module.state_dict()]
        tensors = {name.removeprefix(prefix): tensor.float() for name, tensor in read(self.folder, names)}
        module.load_state_dict(tensors, assign=True)


def walkable(folder: Path) -> bool:
    """Whether the model consists of `model.layers` whose tensors have the same names in the files as in the module."""
    model = _empty(folder)
    names = {name for shard in shards(folder) for name in tensor_specs(shard)}
    inner = getattr(model, "model", None)
    if not all(hasattr(inner, name) for name in ("embed_tokens", "layers", "norm")):
        return False
    return {name for name in model.state_dict() if name.startswith(("model.layers.", "model.embed_tokens."))} <= names


def _empty(folder: Path) -> Any:
    """Return the model without weights; buffers that are computed from its configuration are present."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    return model.eval()


@dataclass(frozen=True)
class Layer:
    """A loaded layer, the batches that it reads, and the arguments that the model calls it with for each."""

    index: int
    module: Module
    batches: Sequence[Batch]
    calls: Sequence[Mapping[str, Any]]

    def grams(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the sum of x x^T over the real inputs x of each named linear module, [inputs, inputs]."""
        sums: dict[str, Any] = dict.fromkeys(names, 0)
        real: list[Tensor] = []  # mask of the current batch

        def add(name: str) -> Callable[..., None]:
            def hook(_: Module, inputs: tuple[Tensor, ...]) -> None:
                states = inputs[0][real[-1]]
                sums[name] = sums[name] + states.t() @ states

            return hook

        with ExitStack() as hooks:
            for name in names:
                handle = self.module.get_submodule(name).register_forward_pre_hook(add(name))
                hooks.callback(handle.remove)
            for batch, call in zip(self.batches, self.calls, strict=True):
                real.append(batch.real)
                self._run(batch, call)
        return sums

    def forward(self) -> list[Batch]:
        """Return the batches that the next layer reads."""
        both = zip(self.batches, self.calls, strict=True)
        return [Batch(self._run(batch, call), batch.real) for batch, call in both]

    def _run(self, batch: Batch, call: Mapping[str, Any]) -> Tensor:
        import torch

        with torch.no_grad():
            states = self.module(batch.states, **call)
        return states if isinstance(states, torch.Tensor) else states[0]


def _enter(inner: Any, padded: Sequence[tuple[Tensor, Tensor]]) -> tuple[list[Batch], list[list[Mapping[str, Any]]]]:
    """Return the embedded rows, and for each batch the arguments that the model passes to each of its layers."""
    import torch

    layers, norm = inner.layers, inner.norm
    inner.norm = torch.nn.Identity()
    inner.layers = torch.nn.ModuleList(_recorder()() for _ in layers)
    batches, calls = [], []
    for ids, real in padded:
        inner(inputs_embeds=inner.embed_tokens(ids), use_cache=False)
        batches.append(Batch(inner.layers[0].states, real))  # after the scaling that some models apply to embeddings
        calls.append([stand_in.arguments for stand_in in inner.layers])
    inner.layers, inner.norm = layers, norm
    return batches, calls


def _recorder() -> Any:
    """Return a module class that stands in for a layer: it returns its input, and records its arguments."""
    import torch

    class Recorder(torch.nn.Module):
        states: Tensor
        arguments: Mapping[str, Any]

        def forward(self, states: Tensor, **arguments: Any) -> Tensor:
            self.states, self.arguments = states, arguments
            return states

    return Recorder


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return token ids [rows, width], padded on the right, where a causal model cannot see it, and which of them are real."""
    import torch

    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    return ids, torch.arange(width) < lengths[:, None]
