"""Several adapters active at once on one base: each base weight plus the weighted sum of the adapters' changes.

The folder RUN/train/adapter holds them in place of a single adapter: several.json lists them, and each has its own subfolder. An adapter's
change is the weight with that adapter alone minus the base weight. The sum therefore has one meaning for low-rank deltas, DoRA, whole
tensors, biases and trained rows, and does not depend on the order.
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
LEFT_OUT = ("checkpoint*", "*.bin", "*.pt")  # not copied from an adapter's folder


def write(out: Path, adapters: Sequence[Path], weights: Sequence[float]) -> None:
    """Create the folder `out` with copies of these adapters and their weights."""
    out.mkdir(parents=True)
    names = [f"{number}-{adapter.resolve().name}" for number, adapter in enumerate(adapters)]
    for name, adapter in zip(names, adapters, strict=True):
        shutil.copytree(adapter, out / name, ignore=shutil.ignore_patterns(*LEFT_OUT))
    entries = [{"folder": name, "weight": weight} for name, weight in zip(names, weights, strict=True)]
    (out / FILE).write_text(json.dumps(entries, indent=1), encoding="utf-8")


def is_several(adapter: Path) -> bool:
    """Whether this folder holds several adapters instead of one."""
    return (adapter / FILE).is_file()


def members(adapter: Path) -> list[tuple[Path, float]]:
    """The adapters of a folder with their weights; for a single adapter, the adapter itself with weight 1."""
    if not is_several(adapter):
        return [(adapter, 1.0)]
    entries = json.loads((adapter / FILE).read_text(encoding="utf-8"))
    return [(adapter / entry["folder"], float(entry["weight"])) for entry in entries]


def put_on(base: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """Activate all of the folder's adapters on `base`, in place.

    Each changed module returns base output + the sum over the adapters of weight * (output with that adapter alone - base output). PEFT's
    layers compute the output with one adapter, in a copy of the model that shares the base's matrices; the weights are not combined.

    Raises:
        ModelError: an adapter changes a module whose output is not linear in its weights, so that outputs cannot be added up.
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
    """A copy of the model with one adapter, loaded by PEFT. It shares the matrices of `base`; biases may be replaced, so vectors are copied."""
    import copy

    from peft import PeftModel
    from torch.nn import Parameter

    from qkit.model.adapters import targets

    memo: dict[int, Any] = {id(held): held for held in (*base.parameters(), *base.buffers()) if held.ndim > 1}
    for held in base.parameters():
        if held.ndim < 2:
            memo[id(held)] = Parameter(held.detach().clone(), requires_grad=False)
    with targets.patterns_of_parameters():
        return PeftModel.from_pretrained(copy.deepcopy(base, memo), str(adapter)).eval().get_base_model()


def _differing(base: Any, other: Any, prefix: str = "") -> Iterator[str]:
    """Names of the modules that PEFT replaced or whose values differ."""
    for name, child in base.named_children():
        theirs = getattr(other, name)
        if type(theirs) is not type(child) or not _same_values(child, theirs):
            if any(True for _ in child.children()):
                raise ModelError(
                    f"{prefix}{name}: an adapter changes this module as a whole, and its output is not linear in its weights. Such "
                    "adapters can be merged together, but the result cannot be measured: omit --data"
                )
            yield prefix + name
        else:
            yield from _differing(child, theirs, f"{prefix}{name}.")


def _same_values(one: Any, other: Any) -> bool:
    pairs = zip(one.parameters(recurse=False), other.parameters(recurse=False), strict=True)
    return all(held is theirs or held.equal(theirs) for held, theirs in pairs)


def _add_up(module: Any, others: Sequence[tuple[Any, float]]) -> None:
    """Make `module` return the weighted sum of outputs. The others become submodules, so that `model.to()` reaches them."""
    for number, (other, _) in enumerate(others):
        module.add_module(f"alone{number}", other)

    def hook(_: Any, args: Any, kwargs: Any, output: torch.Tensor) -> torch.Tensor:
        base = output.float()
        total = base.clone()
        for other, weight in others:
            total += weight * (other(*args, **kwargs).float() - base)
        return total.to(output.dtype)

    module.register_forward_hook(hook, with_kwargs=True)
