"""Merges an adapter into a base, block by block of a tensor's rows, from shard to shard.

The delta is added in fp32 and rounded once. It is added either to the weights that the adapter was trained against (the base quantized to 4 bit
and dequantized again) or to the base's 16-bit weights. Which of the two is closer to what was trained is measured elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.errors import ModelError
from qkit.core.progress import Bar, Progress
from qkit.merging.layout import Group, Layout
from qkit.merging.sizes import SAFETENSORS_NAMES, OutputShape, kept_dtype, untied_head, vocabulary_of, write_config
from qkit.model.adapters import sums as adapter_sum
from qkit.recipe import schema
from qkit.recipe.schema import Base
from qkit.tensors.lora_deltas import Deltas, Experts, LowRank
from qkit.tensors.nf4_roundtrip import FourBit
from qkit.tensors.shard_writer import model_specs, write_model
from qkit.tensors.shards import Spec, read

if TYPE_CHECKING:
    import torch

    Rows = tuple[list[int], torch.Tensor]  # indices and values of learned rows


BLOCK_VALUES = 1 << 19  # values of a matrix that are worked on at once: they stay in a core's cache
LEAST_ROWS = 64  # of a block, so that the products are efficient


def merge(
    folder: Path,
    adapter: Path,
    out: Path,
    base: Base,
    section: schema.Merge,
    note: Mapping[str, Any],
    progress: Progress | None = None,
) -> None:
    """Write the weights of `folder` with the adapter added, and config.json, to `out`.

    It holds a few tensors at a time, whatever the size of the model. `base`: which weights to merge into. `adapter`: may be a folder of several
    (model/adapters/sums.py). `note`: the adapter's, which lists the quantized weights. The first dtype that `section` lists is written.

    Raises:
        ModelError: the adapter does not fit this base, is of a kind that cannot be merged, or the result holds NaN or infinity.
    """
    several = adapter_sum.is_several(adapter)
    merged = SumMerge(folder, adapter, base, note) if several else TensorMerge(folder, Deltas(adapter), base, note)
    write_tensors(folder, merged, out, section, progress)
    merged.check_all_used()
    write_config(folder, out, section.dtypes[0], merged.output)


def write_tensors(
    folder: Path, merged: TensorMerge | SumMerge, out: Path, section: schema.Merge, progress: Progress | None
) -> None:
    """Write merged tensors to `out`, in the first dtype that `section` lists. `folder`: of the weights that they were made from."""
    dtype = section.dtypes[0]
    specs = {name: {**spec, "dtype": kept_dtype(spec["dtype"], dtype)} for name, spec in merged.specs.items()}
    with (progress or Progress()).bar("merge", len(specs)) as bar:
        write_model(out, specs, _rounded(folder, dtype, merged, merged.tensors(bar)), section.max_shard_bytes)


@dataclass(frozen=True)
class Head:
    """The head that the merge creates because the adapter changes one end of a tied pair; `name` is "" if it creates none.

    `embedding`: the tensor that the head starts as. `tied_in_training`: the adapter itself trained the pair as one.
    """

    name: str
    embedding: str
    tied_in_training: bool


class TensorMerge:
    """Merges one adapter, one tensor of the checkpoint at a time; `specs` are the dtypes (of the base) and shapes of the result."""

    def __init__(
        self, folder: Path, deltas: Deltas, base: Base, note: Mapping[str, Any], head: tuple[str, str] | None = None
    ):
        """`head`: names of a head to create and of the embedding that it starts as; None: the adapter decides."""
        base_specs = dict(model_specs(folder))
        self.folder = folder
        self.deltas = deltas
        self.layout = Layout(folder, base_specs)
        deltas.find_parameters(self.layout.model)
        self.quantized = set(note["quantized"]) if base == "dequantized" else set()
        self.quantization = note["quantization"]
        self.transposed = _conv1d_weights(self.layout)
        self.head = _head(folder, base_specs, deltas, self.layout, head)
        if self.head.name:
            base_specs[self.head.name] = base_specs[self.head.embedding]
        self.specs = {name: {"dtype": s["dtype"], "shape": self._shape(name, s)} for name, s in base_specs.items()}
        self.output = OutputShape(bool(self.head.name), vocabulary_of(base_specs, self.specs))
        self.groups = self._changed_groups(base_specs)
        self.pending: dict[str, torch.Tensor] = {}  # merged tensors of a group that are not written yet
        self.expert_delta: tuple[tuple[str, int], dict[str, torch.Tensor]] = (("", 0), {})  # of the last expert

    def tensors(self, bar: Bar) -> Iterator[tuple[str, Iterator[torch.Tensor]]]:
        """Every merged tensor in blocks of rows, in the order of `specs`."""
        sources = [self.source(name) for name in self.specs]
        for name, (_, weight) in zip(self.specs, read(self.folder, sources), strict=True):
            yield name, self._merged(name, weight)
            del weight  # the next one is being read
            bar.advance()

    def check_all_used(self) -> None:
        """Raise ModelError if the adapter changes a weight that the base does not have."""
        self.deltas.check_all_used()

    def source(self, name: str) -> str:
        """The base's tensor that becomes `name`."""
        return self.head.embedding if name == self.head.name else name

    def _model_name(self, name: str) -> str:
        """The model's name of a checkpoint's tensor; adapters of older transformers use the checkpoint's names, and so does this for them."""
        model_name = self.layout.names.get(name, name)
        return name if self.deltas.changes(name) and not self.deltas.changes(model_name) else model_name

    def _shape(self, name: str, spec: Spec) -> Sequence[int]:
        shape: Sequence[int] = self.deltas.shape(self._model_name(name)) or spec["shape"]
        return shape

    def _changed_groups(self, specs: Mapping[str, Spec]) -> dict[str, Group]:
        """The groups of tensors that the model holds in other pieces than the checkpoint, if the adapter or quantization changes them."""
        changed: dict[str, Group] = {}
        for group in {id(group): group for group in self.layout.groups.values()}.values():
            targets = self.layout.targets(group, specs)
            if any(self.deltas.changes(name) or name in self.quantized for name in targets):
                changed |= dict.fromkeys(group.names, group)
        return changed

    # --- a tensor of the checkpoint -----------------------------------------------------------------------------------

    def _merged(self, name: str, weight: torch.Tensor) -> Iterator[torch.Tensor]:
        """The merged tensor of the checkpoint, in blocks of rows."""
        group = self.groups.get(name)
        if group is None:
            return self._merged_weight(self._model_name(name), weight)
        experts = self.deltas.experts(group.target) if group.by_expert else None
        if experts is not None:
            return iter([self._one_expert(group, name, experts) + weight])
        if name not in self.pending:
            self.pending |= self._whole_group(group)
        return iter([self.pending.pop(name)])

    def _one_expert(self, group: Group, name: str, experts: Experts) -> torch.Tensor:
        """The delta of one expert's tensor: its slice, converted by transformers from the model's layout to the checkpoint's."""
        first, index = group.place(name)
        if self.expert_delta[0] != (group.target, index):
            _need_shape(self.deltas, group.target, experts, self.layout.shape(group.target))
            pieces = self.layout.saved({group.target: experts.delta(index, index + 1)})
            self.expert_delta = (group.target, index), pieces
        return self.expert_delta[1][first]

    def _whole_group(self, group: Group) -> dict[str, torch.Tensor]:
        """All tensors of a group, merged in the model's layout and converted back."""
        import torch

        loaded = self.layout.loaded(group, dict(read(self.folder, group.names)))
        merged = {
            name: torch.cat([block.float() for block in self._merged_weight(name, loaded[name])]) for name in loaded
        }
        return self.layout.saved(merged)

    # --- a weight of the model ----------------------------------------------------------------------------------------

    def _merged_weight(self, name: str, weight: torch.Tensor) -> Iterator[torch.Tensor]:
        """The merged weight of the model, in blocks of rows."""
        replaced = self.deltas.replaced(name)
        weight = weight if replaced is None else replaced
        delta, rows = self._delta(name), self._learned_rows(name)
        if rows is not None and delta is None:
            return _put_rows(weight, *rows)
        if rows is not None:
            weight = _with_rows(weight, *rows)
        if (bias := self.deltas.bias(name)) is not None:
            weight = weight.float() + bias
        if delta is not None:
            _need_shape(self.deltas, name, delta, weight.shape)
        if name in self.quantized and replaced is None:
            return self._onto_4_bit(name, weight, delta)
        return _add_delta(weight, None, delta)

    def _onto_4_bit(self, name: str, weight: torch.Tensor, delta: LowRank | Experts | None) -> Iterator[torch.Tensor]:
        """The weight as 4-bit training sees it, plus the delta; bitsandbytes quantizes the transpose of a Conv1D's weight."""
        if name not in self.transposed:
            return _add_delta(weight, FourBit(weight, self.quantization), delta)
        turned = FourBit(weight.T.contiguous(), self.quantization)
        return _add_delta(turned.rows(0, weight.shape[1]).T, None, delta)

    def _delta(self, name: str) -> LowRank | Experts | None:
        experts = self.deltas.experts(name)
        if experts is None and name.endswith(".weight"):
            return self.deltas.low_rank(name, name in self.transposed)
        return experts

    def _learned_rows(self, name: str) -> Rows | None:
        """Learned rows of a matrix. A head that another adapter of a sum creates starts as this one's embedding, learned rows included."""
        rows = self.deltas.learned_rows(name)
        if rows is None and self.head.tied_in_training and name == self._model_name(self.head.name):
            return self.deltas.learned_rows(self._model_name(self.head.embedding))
        return rows


class SumMerge:
    """Merges several adapters: each alone, and the changes are added up in lockstep, in fp32."""

    def __init__(self, folder: Path, adapters: Path, base: Base, note: Mapping[str, Any]):
        members = adapter_sum.members(adapters)
        self.weights = [weight for _, weight in members]
        merges = [TensorMerge(folder, Deltas(adapter), base, note) for adapter, _ in members]
        head = next(((one.head.name, one.head.embedding) for one in merges if one.head.name), ("", ""))
        self.merges = [
            one if one.head.name == head[0] else TensorMerge(folder, one.deltas, base, note, head) for one in merges
        ]
        self.base = TensorMerge(folder, Deltas(None), base, note, head)
        self.specs, self.output = self.base.specs, self.base.output
        for one in self.merges:
            if one.output.vocabulary is not None:
                raise ModelError(
                    f"{one.deltas.adapter}: has resized embeddings, which cannot be summed with those of the base or of another adapter; "
                    "merge it alone, without --weight, and merge the next adapter into the result",
                    source=one.deltas.adapter,
                )

    def source(self, name: str) -> str:
        """The base's tensor that becomes `name`."""
        return self.base.source(name)

    def tensors(self, bar: Bar) -> Iterator[tuple[str, Iterator[torch.Tensor]]]:
        """Every merged tensor in blocks of rows, in the order of `specs`. The base is read once for each adapter, to save memory."""
        with Progress().bar("merge", None) as silent:
            others = [one.tensors(silent) for one in self.merges]
            for (name, own), *merged in zip(self.base.tensors(bar), *others, strict=True):
                yield name, self._sum(own, [blocks for _, blocks in merged])

    def _sum(self, base: Iterator[torch.Tensor], merged: Sequence[Iterator[torch.Tensor]]) -> Iterator[torch.Tensor]:
        """Rows of the base + the sum of weight * (rows with one adapter - rows of the base)."""
        for start, *others in _aligned([base, *merged]):
            if not start.is_floating_point():
                yield start
                continue
            total = start.float().clone()
            for weight, rows in zip(self.weights, others, strict=True):
                total += weight * (rows.float() - start.float())
            yield total

    def check_all_used(self) -> None:
        """Raise ModelError if an adapter changes a weight that the base does not have."""
        for one in self.merges:
            one.check_all_used()


def _head(
    folder: Path, specs: Mapping[str, Spec], deltas: Deltas, layout: Layout, named: tuple[str, str] | None
) -> Head:
    own = untied_head(folder, specs, deltas, layout)
    name, embedding = own if named is None else named
    return Head(name, embedding, tied_in_training=bool(name) and not own[0])


# --- rounding ---------------------------------------------------------------------------------------------------------


def _rounded(
    folder: Path,
    dtype: str,
    merged: TensorMerge | SumMerge,
    tensors: Iterable[tuple[str, Iterable[torch.Tensor]]],
) -> Iterator[tuple[str, Iterator[torch.Tensor]]]:
    """The same tensors; those of floating point are rounded to `dtype`.

    Raises:
        ModelError: a rounded value is NaN or infinite.
    """
    import torch

    def blocks(name: str, parts: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        is_float = merged.specs[name]["dtype"] in SAFETENSORS_NAMES.values()
        for part in parts:
            rounded = part.to(getattr(torch, dtype)) if is_float else part
            if is_float and not bool(rounded.isfinite().all()):
                raise ModelError(_not_finite(folder, merged.source(name), name, part, dtype), source=folder)
            yield rounded

    for name, parts in tensors:
        yield name, blocks(name, parts)


def _not_finite(folder: Path, source: str, name: str, part: torch.Tensor, dtype: str) -> str:
    """The message, which names the cause: the base, the dtype or the adapter."""
    import torch

    ((_, base),) = read(folder, [source])
    if not bool(base.isfinite().all()):
        return f"{folder}: {name} of the base contains NaN or infinite values; get another copy of the base"
    if bool(part.isfinite().all()):
        largest, limit = float(part.float().abs().max()), torch.finfo(getattr(torch, dtype)).max
        return (
            f"the merged {name} contains {largest:g}, and the largest {dtype} is {limit:g}: lower --weight, or set merge.dtype to "
            "bfloat16 or float32"
        )
    return f"the merged {name} contains NaN or infinite values, and the base's does not: the adapter or its weight causes them"


# --- blocks of rows ---------------------------------------------------------------------------------------------------


def _aligned(streams: Sequence[Iterator[torch.Tensor]]) -> Iterator[list[torch.Tensor]]:
    """The same rows of each stream: the streams split a tensor into blocks of different sizes."""
    blocks = [next(stream) for stream in streams]
    while blocks:
        if blocks[0].ndim == 0:
            yield blocks
            return
        rows = min(map(len, blocks))
        yield [block[:rows] for block in blocks]
        rest = [
            block[rows:] if len(block) > rows else next(stream, None)
            for block, stream in zip(blocks, streams, strict=True)
        ]
        blocks = [block for block in rest if block is not None]


def _need_shape(deltas: Deltas, name: str, delta: LowRank | Experts, shape: Sequence[int]) -> None:
    """Raise ModelError if a delta does not have the shape of its weight."""
    if list(delta.shape) != list(shape):
        raise ModelError(
            f"{deltas.adapter}: its delta of {name} has shape {list(delta.shape)}, but the base's weight has shape {list(shape)}: "
            "the adapter was trained on another model",
            source=deltas.adapter,
        )


def _add_delta(
    weight: torch.Tensor, four_bit: FourBit | None, delta: LowRank | Experts | None
) -> Iterator[torch.Tensor]:
    """Blocks of rows of the weight, or of its 4-bit round trip, plus the delta."""
    if four_bit is None and delta is None:
        yield weight
        return
    for begin, end in _blocks(weight, delta is None or delta.by_rows):
        rows = weight[begin:end] if four_bit is None else four_bit.rows(begin, end)
        yield rows if delta is None else delta.added(rows, begin, end)


def _blocks(weight: torch.Tensor, by_rows: bool) -> Iterator[tuple[int, int]]:
    """Begin and end of blocks of rows of about equal size, each a whole number of quantization blocks."""
    count, width = len(weight), weight[0].numel()
    step = FourBit.BLOCK // gcd(width, FourBit.BLOCK)
    least = LEAST_ROWS if weight.ndim < 3 else 1  # a "row" of a stack of experts is a matrix
    rows = max(least, BLOCK_VALUES // width) if by_rows else count
    pieces = max(1, count // rows)
    rows = ceil(ceil(count / pieces) / step) * step
    yield from ((begin, min(begin + rows, count)) for begin in range(0, count, rows))


def _put_rows(weight: torch.Tensor, indices: list[int], rows: torch.Tensor) -> Iterator[torch.Tensor]:
    """Blocks of the weight with the learned rows in place; they are rounded when written, not before."""
    import torch

    places = torch.tensor(indices)
    for begin, end in _blocks(weight, True):
        inside = (places >= begin) & (places < end)
        if not inside.any():
            yield weight[begin:end]
            continue
        yield weight[begin:end].float().index_copy_(0, places[inside] - begin, rows[inside].float())


def _with_rows(weight: torch.Tensor, indices: list[int], rows: torch.Tensor) -> torch.Tensor:
    """The weight with the learned rows in place, rounded to its dtype as the reference model rounds them."""
    import torch

    return weight.index_copy_(0, torch.tensor(indices), rows.to(weight.dtype))


def _conv1d_weights(layout: Layout) -> frozenset[str]:
    """The weights that are stored [in, out]: those of Conv1D modules, which a few old architectures use."""
    from transformers.pytorch_utils import Conv1D

    modules = layout.model.named_modules() if layout.model is not None else ()
    return frozenset(f"{name}.weight" for name, module in modules if isinstance(module, Conv1D))
