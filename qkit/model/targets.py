"""Which weights get an adapter: what `lora.target_modules` and `lora.target_parameters` name, in the plan and in the model itself.

peft takes a list of which one name matches and the others do not, and turns `all-linear` on some mixtures of experts into parameters, the
router's among them. Here every name matches something or is an error, the router is left alone unless it is named, and peft is told
each parameter by name. The same code reads a shape, before anything is loaded, and the model, before anything is trained.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from qkit.core.errors import ModelError
from qkit.model import shape
from qkit.model.shape import Linear, Shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qkit.recipe.schema import Lora


ALL_LINEAR = "all-linear"
NEEDS_NO_DROPOUT = "peft trains experts and routers with no dropout: set lora.lora_dropout=0, or name other modules"


@dataclass(frozen=True)
class Inventory:
    """The weights of a model that an adapter can be trained to, by their whole names.

    `linears`: modules of the layers; `others`: embeddings and head, which all-linear leaves out. `experts` and `routers`: parameters.
    `renamed`: names that peft takes for these -> the parameters' own. `rest`: modules that no adapter can be put on; of a shape those that
    hold others.
    """

    linears: tuple[Linear, ...]
    others: tuple[Linear, ...] = ()
    experts: tuple[Linear, ...] = ()
    routers: tuple[Linear, ...] = ()
    renamed: Mapping[str, str] | None = None
    rest: tuple[str, ...] = ()

    def names(self) -> list[str]:
        """What there is to name, each kind once, the layers' modules first; not the head, whose adapter would never be trained."""
        every = (*self.linears, *self.experts, *self.routers, *(m for m in self.others if m.name != "lm_head"))
        return list(dict.fromkeys(_named(matrix) for matrix in every))


@dataclass(frozen=True)
class Target:
    """A weight that gets an adapter. `parameter`: it is told to peft as one; `times`: its rank over the recipe's."""

    matrix: Linear
    parameter: bool = False
    times: int = 1

    def sizes(self, rank: int) -> tuple[int, int]:
        """Parameters of its two matrices."""
        width = rank * self.times * (self.matrix.experts or 1)
        return width * self.matrix.inputs, width * self.matrix.outputs


def _named(matrix: Linear) -> str:
    """The end of a name that tells kinds apart: of a router's weight two words."""
    parts = matrix.name.split(".")
    return ".".join(parts[-2:]) if parts[-1] == "weight" else parts[-1]


def planned(lora: Lora, sizes: Shape) -> tuple[Target, ...]:
    """What a recipe's section trains of a model of this shape.

    Raises:
        ModelError: as `chosen`.
    """
    return planned_for(names(lora), sizes)


class Names(NamedTuple):
    """What a recipe's section says of it: a key for caches, the same at every rank."""

    modules: str | tuple[str, ...]
    parameters: tuple[str, ...]
    dropout: bool


def names(lora: Lora) -> Names:
    """Of a section."""
    modules = lora.target_modules
    return Names(
        modules if isinstance(modules, str) else tuple(modules), tuple(lora.target_parameters), lora.lora_dropout > 0
    )


@functools.lru_cache(maxsize=64)
def planned_for(named: Names, sizes: Shape) -> tuple[Target, ...]:
    """As `planned`."""
    return _chosen(named, inventory(sizes))


@functools.lru_cache(maxsize=64)
def inventory(sizes: Shape) -> Inventory:
    """Of a shape."""
    linears, others = shape.modules(sizes), shape.vocabulary_modules(sizes)
    names = [matrix.name.split(".") for matrix in (*linears, *others)]
    return Inventory(
        linears,
        others,
        shape.experts(sizes),
        shape.routers(sizes),
        dict(sizes.outline.renamed if sizes.outline else sizes.expert_names),
        tuple(dict.fromkeys(".".join(parts[:end]) for parts in names for end in range(1, len(parts)))),
    )


# --- which are meant ----------------------------------------------------------------------------------------------------


def chosen(lora: Lora, found: Inventory) -> tuple[Target, ...]:
    """The weights that a section names.

    Raises:
        ModelError: a name matches nothing, or peft cannot train what is named so.
    """
    return _chosen(names(lora), found)


def _chosen(named: Names, found: Inventory) -> tuple[Target, ...]:
    by_name = {target.matrix.name: target for target in _by_modules(named.modules, found)}
    for name in named.parameters:
        matches = [matrix for matrix in (*found.experts, *found.routers) if _ends(matrix.name, name)]
        if not matches:
            raise ModelError(_unknown("lora.target_parameters", [name], [*found.experts, *found.routers]))
        for matrix in matches:
            by_name.setdefault(matrix.name, Target(matrix, parameter=True))
    targets = tuple(by_name.values())
    if named.dropout and any(target.parameter for target in targets):
        first = next(target.matrix.name for target in targets if target.parameter)
        raise ModelError(f"lora.lora_dropout and an adapter on {first} are both asked for; {NEEDS_NO_DROPOUT}")
    return targets


def _by_modules(targets: str | tuple[str, ...], found: Inventory) -> list[Target]:
    if isinstance(targets, str):
        return _all_linear(found) if targets.lower() == ALL_LINEAR else _by_pattern(targets, found)
    if unknown := [name for name in targets if not any(_by_word(name, found))]:
        raise ModelError(_unknown("lora.target_modules", unknown, found.names()))
    every = [target for name in targets for target in _by_word(name, found)]
    _need_pairs([_old_name(name, found) for name in targets], found)
    return list({target.matrix.name: target for target in every}.values())


def _all_linear(found: Inventory) -> list[Target]:
    """Every linear module, and the experts where peft's own all-linear has them; never the router."""
    experts = [_expert(matrix, found) for matrix in found.experts] if found.renamed else []
    return [*(Target(matrix) for matrix in found.linears if not _hidden(matrix, found)), *experts]


def _expert(matrix: Linear, found: Inventory) -> Target:
    """By its old names: a parameter that is several of them in one has the rank of all of them."""
    times = sum(own == _named(matrix) for own in (found.renamed or {}).values())
    return Target(matrix, parameter=True, times=max(times, 1))


def _hidden(matrix: Linear, found: Inventory) -> bool:
    """Whether peft takes every name of a module for that of the experts, so that the module itself cannot be named."""
    return _named(matrix) in (found.renamed or {})


def _by_word(name: str, found: Inventory) -> Iterator[Target]:
    """What one name of a list means: peft's rule, that a name ends in it."""
    renamed = found.renamed or {}
    if (old := _old_name(name, found)) is not None:
        wanted = renamed[old]
        yield from (_expert(matrix, found) for matrix in found.experts if _named(matrix) == wanted)
        yield from (Target(matrix, parameter=True) for matrix in found.routers if _named(matrix) == wanted)
        return
    modules = [matrix for matrix in (*found.linears, *found.others) if _ends(matrix.name, name)]
    yield from map(Target, modules)
    if not modules:  # peft has a field of its own for these; here either does
        parameters = (*found.experts, *found.routers)
        yield from (
            Target(m, parameter=True) for m in parameters if _ends(m.name, name) or _ends(m.name, f"{name}.weight")
        )


def _old_name(name: str, found: Inventory) -> str | None:
    return next((old for old in found.renamed or {} if _ends(name, old)), None)


def _need_pairs(names: Iterable[str | None], found: Inventory) -> None:
    """Raise ModelError where gate is named without up, or the other way round, and they are one parameter."""
    given, renamed = set(names), found.renamed or {}
    for own in set(renamed.values()):
        parts = {old for old in renamed if renamed[old] == own}
        if 0 < len(parts & given) < len(parts):
            raise ModelError(
                f"lora.target_modules names {', '.join(sorted(parts & given))} without {', '.join(sorted(parts - given))}: in this "
                f"model they are one parameter, {own}; name both, or neither"
            )


def _by_pattern(pattern: str, found: Inventory) -> list[Target]:
    """What a regular expression over whole names matches; experts by their own names, or by all that peft takes for them."""
    try:
        matches = re.compile(pattern).fullmatch
    except re.error as error:
        raise ModelError(
            f"lora.target_modules={pattern!r} is no regular expression ({error}); write names as a list"
        ) from None
    plain = [m for m in (*found.linears, *found.others) if matches(m.name) and not _hidden(m, found)]
    experts = []
    for matrix in found.experts:
        folder = matrix.name.rpartition(".")[0]
        old = [f"{folder}.{name}" for name, own in (found.renamed or {}).items() if own == _named(matrix)]
        hits = [name for name in old if matches(name)]
        if matches(matrix.name) or (old and len(hits) == len(old)):
            experts.append(_expert(matrix, found) if old else Target(matrix, parameter=True))
        elif hits:
            _need_pairs([name.rpartition(".")[2] for name in hits], found)
    routers = [m for m in found.routers if matches(m.name) or matches(m.name.removesuffix(".weight"))]
    targets = [*map(Target, plain), *experts, *(Target(m, parameter=True) for m in routers)]
    if not targets:
        whole = next(iter(found.linears or found.others)).name
        raise ModelError(
            f"lora.target_modules={pattern!r} matches nothing: as a string it is a regular expression over the whole name, such as {whole}; "
            f"write names as a list, [{pattern}]. {_has(found.names())}"
        )
    _refuse_others(pattern, targets, found)
    return targets


def _refuse_others(pattern: str, targets: Sequence[Target], found: Inventory) -> None:
    """Raise ModelError where a pattern matches the head, or modules on which peft cannot put an adapter."""
    if any(target.matrix.name == "lm_head" for target in targets):
        raise ModelError(
            f"lora.target_modules={pattern!r} matches lm_head, whose adapter would never be trained: the loss is made of the head's own "
            "weights; leave it out, or write all-linear"
        )
    wrong = (
        [name for name in found.rest if re.fullmatch(pattern, name)] if not found.experts else []
    )  # else peft is given names
    if wrong:
        raise ModelError(
            f"lora.target_modules={pattern!r} matches {len(wrong)} modules that are not linear, and peft refuses those; the first is "
            f"{wrong[0]}. End it with the names that are meant, such as {pattern}\\.({'|'.join(found.names()[:2])}), or write all-linear"
        )


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _unknown(field: str, names: Sequence[str], found: Sequence[str | Linear]) -> str:
    said = [entry if isinstance(entry, str) else _named(entry) for entry in found]
    return f"{field} names {', '.join(names)}, which this model does not have. {_has(list(dict.fromkeys(said)))}"


def _has(names: Sequence[str]) -> str:
    return f"It has {', '.join(names)}" if names else "It has no experts and no router"


# --- what is worth a word -----------------------------------------------------------------------------------------------


def remarks(lora: Lora, sizes: Shape) -> Iterator[str]:
    """What a plan says of a mixture of experts: which of its parts are trained, and which are not.

    Raises:
        ModelError: as `planned`.
    """
    found, trained = inventory(sizes), {target.matrix.name for target in planned(lora, sizes)}
    for what, of in (("experts get", found.experts), ("router gets", found.routers)):
        if of and not any(matrix.name in trained for matrix in of):
            kinds = ", ".join(dict.fromkeys(_named(matrix) for matrix in of))
            yield f"The {what} no adapter; lora.target_parameters=[{kinds}] asks for one."
    hidden = [matrix for matrix in found.linears if _hidden(matrix, found)]
    if hidden:
        kinds = ", ".join(dict.fromkeys(_named(matrix) for matrix in hidden))
        yield (
            f"{len(hidden)} modules outside the experts ({kinds}; the first is {hidden[0].name}) get no adapter: peft takes these names for "
            "those of the experts."
        )


# --- the model itself ---------------------------------------------------------------------------------------------------


def inventory_of(model: PreTrainedModel) -> Inventory:
    """Of a model, whether it is loaded, in 4 bit or not, or has no weights."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    experts = tuple(_expert_parameters(model))
    holders = {matrix.name.rpartition(".")[0].rpartition(".")[0]: matrix.experts for matrix in experts}
    routers = tuple(_routers(model, holders))
    not_linear = {matrix.name.removesuffix(".weight") for matrix in routers}
    linears: list[Linear] = []
    others: list[Linear] = []
    rest: list[str] = []
    for name, module in model.named_modules():
        if (sizes := _sizes(module)) is None or name in not_linear:
            rest.append(name)
            continue
        matrix = Linear(name, *sizes, getattr(module, "bias", None) is not None)
        outside = module is head or module is embedding or not _is_linear(module)
        (others if outside else linears).append(matrix)
    return Inventory(tuple(linears), tuple(others), experts, routers, _renamed(model) if experts else {}, tuple(rest))


def _is_linear(module: Any) -> bool:
    import torch
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (torch.nn.Linear, Conv1D))


def _sizes(module: Any) -> tuple[int, int] | None:
    """Inputs and outputs of what peft puts an adapter on: linear modules, those of GPT-2, and embeddings."""
    import torch
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, torch.nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    if isinstance(module, torch.nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return None


def _expert_parameters(model: PreTrainedModel) -> Iterator[Linear]:
    """Parameters of three dimensions: [experts, out, in], or [experts, in, out] where their module says so."""
    for name, module in model.named_modules():
        if type(module).__module__.startswith("torch.nn"):  # convolutions have three dimensions as well
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3:
                count, outputs, inputs = map(int, parameter.shape)
                if getattr(module, "is_transposed", False):
                    inputs, outputs = outputs, inputs
                yield Linear(f"{name}.{own}", inputs, outputs, hasattr(module, f"{own}_bias"), count)


def _routers(model: PreTrainedModel, holders: Mapping[str, int]) -> Iterator[Linear]:
    """What stands beside the experts with a weight of a row for each of them."""
    for name, module in model.named_modules():
        count, weight = holders.get(name.rpartition(".")[0]), getattr(module, "weight", None)
        if count and weight is not None and weight.ndim == 2 and int(weight.shape[0]) == count:
            yield Linear(f"{name}.weight", int(weight.shape[1]), count, getattr(module, "bias", None) is not None)


def _renamed(model: PreTrainedModel) -> dict[str, str]:
    """Peft's own table for this model."""
    from peft.utils import transformers_weight_conversion as tables

    kind = tables._MODEL_TO_CONVERSION_PATTERN.get(model.config.model_type)
    return dict(tables._MOE_TARGET_MODULE_MAPPING.get(kind, {}))


@contextmanager
def patterns_of_parameters() -> Iterator[None]:
    """Around what makes peft's model: it holds patterns against modules alone, and warns of those that are of parameters and do apply."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
        yield


def for_peft(lora: Lora, model: PreTrainedModel) -> dict[str, Any]:
    """The fields of LoraConfig that say what is trained of this model.

    Raises:
        ModelError: as `chosen`.
    """
    found = inventory_of(model)
    targets = chosen(lora, found)
    if not found.experts:
        names = lora.target_modules
        return {"target_modules": names if isinstance(names, str) else list(names)}
    modules = [target.matrix for target in targets if not target.parameter]
    fields: dict[str, Any] = {
        "target_modules": _short(modules, (*found.linears, *found.others)),
        "target_parameters": _short([t.matrix for t in targets if t.parameter], (*found.experts, *found.routers)),
    }
    more = {_pattern(target.matrix): target.times for target in targets if target.times > 1}
    fields["rank_pattern"] = {pattern: lora.r * times for pattern, times in more.items()}
    fields["alpha_pattern"] = {pattern: lora.lora_alpha * times for pattern, times in more.items()}
    return {name: value for name, value in fields.items() if value or name == "target_modules"}


def _pattern(matrix: Linear) -> str:
    return rf".*\.{re.escape(_named(matrix))}"


def _short(wanted: Sequence[Linear], every: Sequence[Linear]) -> list[str]:
    """Names for peft: a kind's one where all of it is wanted, whole ones else."""
    names, kinds = {matrix.name for matrix in wanted}, {_named(matrix) for matrix in wanted}
    whole = {kind for kind in kinds if all(m.name in names for m in every if _ends(m.name, kind))}
    return sorted({_named(m) if _named(m) in whole else m.name for m in wanted})
