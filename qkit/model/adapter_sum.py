"""Several adapters on one base, active at once, each with a weight: weight + the sum of what each of them changes, times its weight.

A folder of them stands where one adapter would: RUN/train/adapter/several.json names them, in folders of their own beside it. What an
adapter changes is what it makes of a weight alone, less that weight: so the sum means the same for low-rank deltas, DoRA, whole tensors,
biases and learnt rows, and does not depend on their order.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.core.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


FILE = "several.json"
LEFT_OUT = ("checkpoint*", "*.bin", "*.pt")  # of an adapter's folder


def write(out: Path, adapters: Sequence[Path], weights: Sequence[float]) -> None:
    """Make the folder `out` of copies of these adapters."""
    out.mkdir(parents=True)
    names = [f"{number}-{adapter.resolve().name}" for number, adapter in enumerate(adapters)]
    for name, adapter in zip(names, adapters, strict=True):
        shutil.copytree(adapter, out / name, ignore=shutil.ignore_patterns(*LEFT_OUT))
    entries = [{"folder": name, "weight": weight} for name, weight in zip(names, weights, strict=True)]
    (out / FILE).write_text(json.dumps(entries, indent=1), encoding="utf-8")


def is_several(adapter: Path) -> bool:
    """Whether this is a folder of adapters, not an adapter."""
    return (adapter / FILE).is_file()


def members(adapter: Path) -> list[tuple[Path, float]]:
    """The adapters of a folder and their weights; an adapter itself is the only one, with a weight of 1."""
    if not is_several(adapter):
        return [(adapter, 1.0)]
    entries = json.loads((adapter / FILE).read_text(encoding="utf-8"))
    return [(adapter / entry["folder"], float(entry["weight"])) for entry in entries]


def put_on(base: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """`base` with all of the folder's adapters active: each module that one of them changes gives its own output + the sum over the
    adapters of weight * (output with that adapter alone - its own).

    PEFT's own layers compute the output with one adapter, each in a copy of the model that shares the base's matrices; nothing is combined.

    Raises:
        ModelError: an adapter changes a module whose output is not linear in its weights: the sum of outputs is not that of weights.
    """
    changed: dict[str, list[tuple[Any, float]]] = {}
    for one, weight in members(adapter):
        alone = _alone(base, one)
        for name in _differing(base, alone):
            changed.setdefault(name, []).append((alone.get_submodule(name), weight))
    for name, others in changed.items():
        _add_up(base.get_submodule(name), others)
    return base


def _alone(base: PreTrainedModel, adapter: Path) -> Any:
    """The model with one adapter on it, by PEFT; it shares the matrices of `base`, and what is small is its own, as biases may be replaced."""
    import copy

    from peft import PeftModel
    from torch.nn import Parameter

    from qkit.model import targets

    memo: dict[int, Any] = {id(held): held for held in (*base.parameters(), *base.buffers()) if held.ndim > 1}
    for held in base.parameters():
        if held.ndim < 2:
            memo[id(held)] = Parameter(held.detach().clone(), requires_grad=False)
    with targets.patterns_of_parameters():
        return PeftModel.from_pretrained(copy.deepcopy(base, memo), str(adapter)).eval().get_base_model()


def _differing(base: Any, other: Any, prefix: str = "") -> Iterator[str]:
    """Names of the modules that PEFT has put its own in the place of, or given other values."""
    for name, child in base.named_children():
        theirs = getattr(other, name)
        if type(theirs) is not type(child) or not _same_values(child, theirs):
            if any(True for _ in child.children()):
                raise ModelError(
                    f"{prefix}{name}: an adapter changes this module as a whole, and its output is not linear in its weights: several such "
                    "adapters can be merged, and not be measured; leave --data out"
                )
            yield prefix + name
        else:
            yield from _differing(child, theirs, f"{prefix}{name}.")


def _same_values(one: Any, other: Any) -> bool:
    pairs = zip(one.parameters(recurse=False), other.parameters(recurse=False), strict=True)
    return all(held is theirs or held.equal(theirs) for held, theirs in pairs)


def _add_up(module: Any, others: Sequence[tuple[Any, float]]) -> None:
    """Have `module` add up the outputs. The others become parts of it, so that what is done to all of a model's tensors is done to theirs."""
    for number, (other, _) in enumerate(others):
        module.add_module(f"alone{number}", other)

    def hook(_: Any, args: Any, kwargs: Any, output: torch.Tensor) -> torch.Tensor:
        own = output.float()
        total = own.clone()
        for other, weight in others:
            total += weight * (other(*args, **kwargs).float() - own)
        return total.to(output.dtype)

    module.register_forward_hook(hook, with_kwargs=True)
