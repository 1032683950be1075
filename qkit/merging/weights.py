"""Adapter and base become one model, some rows of a tensor at a time, from shard to shard.

The delta is added in fp32 and rounded once: to the weights that the adapter was trained against (the base quantized to 4 bit and dequantized
again), or to the base's 16-bit ones. Which of the two is nearer to what was trained is measured elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import ceil, gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.errors import ModelError
from qkit.core.progress import Bar, Progress
from qkit.merging.layout import Group, Layout
from qkit.merging.sizes import SAFETENSORS_NAMES, Written, head_of_its_own, kept_dtype, vocabulary_of, write_config
from qkit.model import adapter_sum
from qkit.recipe import schema
from qkit.recipe.schema import Base
from qkit.tensors.lora_deltas import Deltas, Experts, LowRank
from qkit.tensors.nf4_roundtrip import FourBit
from qkit.tensors.shard_writer import model_specs, write_model
from qkit.tensors.shards import Spec, read

if TYPE_CHECKING:
    import torch


ROWS_VALUES = 1 << 19  # values of a matrix that are worked on at once: they stay in a core's cache
LEAST_ROWS = 64  # and no fewer rows, so that the products are matrix products


def merge(
    folder: Path,
    adapter: Path,
    out: Path,
    base: Base,
    section: schema.Merge,
    note: Mapping[str, Any],
    progress: Progress | None = None,
) -> None:
    """Write `folder`'s weights, as `base` says, with the adapter added, and config.json.

    Holds a few tensors at a time, whatever the model's size. `adapter` may be a folder of several (several.py). `note`: the adapter's,
    with what was quantized and how. Of several dtypes that `section` would try the first one is written.

    Raises:
        ModelError: the adapter is not one to this base, or of a kind that is not merged.
    """
    one_only = not adapter_sum.is_several(adapter)
    work = _Work(folder, Deltas(adapter), base, note) if one_only else _Sum(folder, adapter, base, note)
    dtype = section.dtypes[0]
    specs = {name: {**spec, "dtype": kept_dtype(spec["dtype"], dtype)} for name, spec in work.specs.items()}
    with (progress or Progress()).bar("merge", len(specs)) as bar:
        whole = _finite(folder, dtype, work, work.tensors(folder, bar))
        write_model(out, specs, whole, section.max_shard_bytes)
    work.check_all_used()
    write_config(folder, out, dtype, work.written)


class _Work:
    """The merge of one tensor, and what all of them will look like."""

    def __init__(
        self, folder: Path, deltas: Deltas, base: Base, note: Mapping[str, Any], head: tuple[str, str] | None = None
    ):
        """`head`: name of a head to be made, and of the embedding that it begins as; None: decided by the adapter."""
        found = dict(model_specs(folder))
        self.folder = folder
        self.deltas = deltas
        self.layout = Layout(folder, found)
        deltas.find_parameters(self.layout.model)
        self.quantized = set(note["quantized"]) if base == "dequantized" else set()
        self.quantization = note["quantization"]
        self.transposed = _stored_transposed(self.layout)
        own = head_of_its_own(folder, found, deltas, self.layout)
        self.head, self.embedding = own if head is None else head
        self.tied = bool(self.head) and not own[0]  # in this adapter's training: what it learnt is in both
        if self.head:
            found[self.head] = found[self.embedding]
        self.converted = self._converted(found)
        self.waiting: dict[str, torch.Tensor] = {}  # of a group that was merged whole, what is still to be written
        self.of_expert: tuple[tuple[str, int], dict[str, torch.Tensor]] = (("", 0), {})
        self.specs = {
            name: {"dtype": s["dtype"], "shape": deltas.shape(self.own_name(name)) or s["shape"]}
            for name, s in found.items()
        }
        self.written = Written(bool(self.head), vocabulary_of(found, self.specs))

    def tensors(self, folder: Path, bar: Bar) -> Iterator[tuple[str, Iterator[torch.Tensor]]]:
        """Every merged tensor, in the order of `specs`."""
        sources = [self.source(name) for name in self.specs]
        for name, (_, weight) in zip(self.specs, read(folder, sources), strict=True):
            yield name, self.merged(name, weight)
            del weight  # the next one is being read
            bar.advance()

    def check_all_used(self) -> None:
        """Raises ModelError when the adapter changes a weight that the base does not have."""
        self.deltas.check_all_used()

    def source(self, name: str) -> str:
        """The base's tensor that becomes `name`."""
        return self.embedding if name == self.head else name

    def own_name(self, name: str) -> str:
        """What the model calls a tensor of the checkpoint; adapters that older transformers made go by the checkpoint's own names."""
        own = self.layout.names.get(name, name)
        return name if self.deltas.changes(name) and not self.deltas.changes(own) else own

    def _converted(self, found: Mapping[str, Spec]) -> dict[str, Group]:
        """The checkpoint's tensors that are pieces of what the adapter changes, or of what was quantized."""
        groups = {id(group): group for group in self.layout.groups.values()}
        kept: dict[str, Group] = {}
        for group in groups.values():
            targets = self.layout.targets(group, found)
            if any(self.deltas.changes(name) or name in self.quantized for name in targets):
                kept |= dict.fromkeys(group.names, group)
        return kept

    def merged(self, name: str, weight: torch.Tensor) -> Iterator[torch.Tensor]:
        """The merged tensor of the checkpoint, some rows after the others."""
        group = self.converted.get(name)
        if group is None:
            return self._merged(self.own_name(name), weight)
        experts = self.deltas.experts(group.target) if group.by_expert else None
        if experts is not None:
            return iter([self._expert_delta(group, name, experts) + weight])
        if name not in self.waiting:
            self.waiting |= self._whole(group)
        return iter([self.waiting.pop(name)])

    def _expert_delta(self, group: Group, name: str, experts: Experts) -> torch.Tensor:
        """Of one expert's tensor: its slice of the delta, by transformers' way from the model to the checkpoint."""
        first, index = group.place(name)
        if self.of_expert[0] != (group.target, index):
            _need_shape(self.deltas, group.target, experts, self.layout.shape(group.target))
            pieces = self.layout.saved({group.target: experts.delta(index, index + 1)})
            self.of_expert = (group.target, index), pieces
        return self.of_expert[1][first]

    def _whole(self, group: Group) -> dict[str, torch.Tensor]:
        """All tensors of a group, merged as the model has them."""
        import torch

        made = self.layout.loaded(group, dict(read(self.folder, group.names)))
        whole = {name: torch.cat([part.float() for part in self._merged(name, made[name])]) for name in made}
        return self.layout.saved(whole)

    def _learnt_rows(self, name: str) -> tuple[list[int], torch.Tensor] | None:
        """Of a matrix; a head that another adapter makes begins as this one's embedding, learnt rows included."""
        found = self.deltas.learnt_rows(name)
        if found is None and self.tied and name == self.own_name(self.head):
            return self.deltas.learnt_rows(self.own_name(self.embedding))
        return found

    def _merged(self, name: str, weight: torch.Tensor) -> Iterator[torch.Tensor]:
        """The merged tensor of the model, some rows after the others."""
        replaced, rows = self.deltas.replaced(name), self._learnt_rows(name)
        weight = weight if replaced is None else replaced
        transposed = name in self.transposed
        change: LowRank | Experts | None = self.deltas.experts(name)
        if change is None and name.endswith(".weight"):
            change = self.deltas.low_rank(name, transposed)
        if rows is not None:
            if change is None:
                return _rows_put_in(weight, *rows)
            weight = _with_rows(weight, *rows)
        if (bias := self.deltas.bias(name)) is not None:
            weight = weight.float() + bias
        if change is not None:
            _need_shape(self.deltas, name, change, weight.shape)
        if name not in self.quantized or replaced is not None:
            return _parts(weight, None, change)
        if transposed:  # bitsandbytes turns it round first
            seen = FourBit(weight.T.contiguous(), self.quantization)
            return _parts(seen.rows(0, weight.shape[1]).T, None, change)
        return _parts(weight, FourBit(weight, self.quantization), change)


class _Sum:
    """The merge of several adapters: each is merged alone, and what it changed is added up, in lockstep and in fp32."""

    def __init__(self, folder: Path, adapters: Path, base: Base, note: Mapping[str, Any]):
        members = adapter_sum.members(adapters)
        self.weights = [weight for _, weight in members]
        alone = [_Work(folder, Deltas(adapter), base, note) for adapter, _ in members]
        head = next(((work.head, work.embedding) for work in alone if work.head), ("", ""))
        self.alone = [work if work.head == head[0] else _Work(folder, work.deltas, base, note, head) for work in alone]
        self.base = _Work(folder, Deltas(None), base, note, head)
        self.specs, self.written = self.base.specs, self.base.written
        for work in self.alone:
            if work.written.vocabulary is not None:
                raise ModelError(
                    f"{work.deltas.adapter}: has resized embeddings, which have no sum with those of the base or of another adapter; "
                    "merge it alone, with no --weight, and the next one into what comes of it"
                )

    def tensors(self, folder: Path, bar: Bar) -> Iterator[tuple[str, Iterator[torch.Tensor]]]:
        """Every merged tensor, in the order of `specs`. The base is read once more for each adapter: none holds what another one changes."""
        with Progress().bar("merge", None) as silent:
            others = [work.tensors(folder, silent) for work in self.alone]
            for (name, own), *merged in zip(self.base.tensors(folder, bar), *others, strict=True):
                yield name, self.added(own, [parts for _, parts in merged])

    def added(self, own: Iterator[torch.Tensor], merged: Sequence[Iterator[torch.Tensor]]) -> Iterator[torch.Tensor]:
        """Rows of the base + the sum of weight * (rows with one adapter - rows of the base)."""
        for base, *parts in _aligned([own, *merged]):
            if not base.is_floating_point():
                yield base
                continue
            total = base.float().clone()
            for weight, part in zip(self.weights, parts, strict=True):
                total += weight * (part.float() - base.float())
            yield total

    def check_all_used(self) -> None:
        """Raises ModelError when one of the adapters changes a weight that the base does not have."""
        for work in self.alone:
            work.check_all_used()


def _finite(
    folder: Path, dtype: str, work: _Work | _Sum, tensors: Iterable[tuple[str, Iterable[torch.Tensor]]]
) -> Iterator[tuple[str, Iterator[torch.Tensor]]]:
    """The same tensors, rounded to `dtype` where they are floating-point.

    Raises:
        ModelError: a value of one is no finite number then.
    """
    import torch

    def rounded(name: str, parts: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        for part in parts:
            kept = work.specs[name]["dtype"] in SAFETENSORS_NAMES.values()
            made = part.to(getattr(torch, dtype)) if kept else part
            if kept and not bool(made.isfinite().all()):
                raise ModelError(_not_finite(folder, work, name, part, dtype))
            yield made

    for name, parts in tensors:
        yield name, rounded(name, parts)


def _not_finite(folder: Path, work: _Work | _Sum, name: str, part: torch.Tensor, dtype: str) -> str:
    """Whose fault it is: the base's, the dtype's, or the adapter's."""
    import torch

    one = work if isinstance(work, _Work) else work.base
    ((_, own),) = read(folder, [one.source(name)])
    if not bool(own.isfinite().all()):
        return f"{folder}: the base's own {name} holds values that are no finite numbers (nan or inf); take another copy of the base"
    if bool(part.isfinite().all()):
        largest, most = float(part.float().abs().max()), torch.finfo(getattr(torch, dtype)).max
        return (
            f"the merged {name} holds {largest:g}, and {dtype} ends at {most:g}: lower --weight, or set merge.dtype to "
            "bfloat16 or float32"
        )
    return (
        f"the merged {name} holds values that are no finite numbers (nan or inf), and the base's does not: they come of the "
        "adapter, or of its weight"
    )


def _aligned(streams: Sequence[Iterator[torch.Tensor]]) -> Iterator[list[torch.Tensor]]:
    """The same rows of each of the streams, which cut a tensor into blocks in ways of their own."""
    held = [next(stream) for stream in streams]
    while True:
        if held[0].ndim == 0:
            yield held
            return
        rows = min(map(len, held))
        yield [part[:rows] for part in held]
        rest = [
            part[rows:] if len(part) > rows else next(stream, None) for part, stream in zip(held, streams, strict=True)
        ]
        held = [part for part in rest if part is not None]
        if not held:
            return


def _need_shape(deltas: Deltas, name: str, change: LowRank | Experts, shape: Sequence[int]) -> None:
    """Raises ModelError where a delta is not one of this weight."""
    if list(change.shape) != list(shape):
        raise ModelError(
            f"{deltas.adapter}: its delta of {name} has shape {list(change.shape)}, and the base's weight {list(shape)}: "
            "it was trained on another model"
        )


def _parts(weight: torch.Tensor, seen: FourBit | None, change: LowRank | Experts | None) -> Iterator[torch.Tensor]:
    """Rows of the weight (as 4-bit training sees it, if need be), with what the adapter adds."""
    if seen is None and change is None:
        yield weight
        return
    for begin, end in _blocks(weight, change is None or change.by_rows):
        rows = weight[begin:end] if seen is None else seen.rows(begin, end)
        yield rows if change is None else change.added(rows, begin, end)


def _blocks(weight: torch.Tensor, by_rows: bool) -> Iterator[tuple[int, int]]:
    """Beginnings and ends of blocks of rows of about one size, each a whole number of quantization blocks."""
    count, width = len(weight), weight[0].numel()
    step = FourBit.BLOCK // gcd(width, FourBit.BLOCK)
    least = LEAST_ROWS if weight.ndim < 3 else 1  # a row of three dimensions is a matrix
    rows = max(least, ROWS_VALUES // width) if by_rows else count
    pieces = max(1, count // rows)
    rows = ceil(ceil(count / pieces) / step) * step
    yield from ((begin, min(begin + rows, count)) for begin in range(0, count, rows))


def _rows_put_in(weight: torch.Tensor, indices: list[int], rows: torch.Tensor) -> Iterator[torch.Tensor]:
    """The weight, block by block, with the rows that were learnt in the place of its own; rounded where it is written, not before."""
    import torch

    places = torch.tensor(indices)
    for begin, end in _blocks(weight, True):
        inside = (places >= begin) & (places < end)
        if not inside.any():
            yield weight[begin:end]
            continue
        yield weight[begin:end].float().index_copy_(0, places[inside] - begin, rows[inside].float())


def _with_rows(weight: torch.Tensor, indices: list[int], rows: torch.Tensor) -> torch.Tensor:
    """The weight with the rows that were learnt in the place of its own, rounded to its dtype as the live model does."""
    import torch

    return weight.index_copy_(0, torch.tensor(indices), rows.to(weight.dtype))


def _stored_transposed(layout: Layout) -> frozenset[str]:
    """The weights that are stored [in, out]: those of Conv1D modules, which a few old architectures have."""
    from transformers.pytorch_utils import Conv1D

    modules = layout.model.named_modules() if layout.model is not None else ()
    return frozenset(f"{name}.weight" for name, module in modules if isinstance(module, Conv1D))
