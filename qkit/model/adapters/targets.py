"""Which weights get an adapter: what `lora.target_modules` and `lora.target_parameters` select, in the plan and in the model itself.

PEFT accepts a list in which only one name matches anything, and on some mixtures of experts expands `all-linear` to parameters that include the
router's. Here every name must match something, the router gets an adapter only if it is named, and PEFT is told each parameter by name. The
same code reads a shape, before anything is loaded, and the model, before anything is trained.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from qkit.core.errors import ModelError
from qkit.model.inventory import Inventory, inventory, inventory_of, kind_of
from qkit.model.shape import Linear, Shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qkit.recipe.schema import Lora


ALL_LINEAR = "all-linear"
NEEDS_NO_DROPOUT = "peft trains experts and routers without dropout: set lora.lora_dropout=0, or name other modules"


@dataclass(frozen=True)
class Target:
    """A weight that gets an adapter. `parameter`: PEFT takes it in target_parameters. `times`: its rank as a multiple of the recipe's."""

    matrix: Linear
    parameter: bool = False
    times: int = 1

    def sizes(self, rank: int) -> tuple[int, int]:
        """Number of parameters of its two factors (down, up)."""
        (width, inputs), (outputs, _) = self.factors(rank)
        return width * inputs, width * outputs

    def factors(self, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows and columns of its two factors (down, up)."""
        width = rank * self.times * (self.matrix.experts or 1)
        return (width, self.matrix.inputs), (self.matrix.outputs, width)


class Names(NamedTuple):
    """What a recipe's lora section names: a cache key that is the same for every rank."""

    modules: str | tuple[str, ...]
    parameters: tuple[str, ...]
    dropout: bool


def names(lora: Lora) -> Names:
    """The names in a recipe's lora section."""
    modules = lora.target_modules
    return Names(
        modules if isinstance(modules, str) else tuple(modules), tuple(lora.target_parameters), lora.lora_dropout > 0
    )


def planned(lora: Lora, sizes: Shape) -> tuple[Target, ...]:
    """The weights that a recipe's lora section trains in a model of this shape.

    Raises:
        ModelError: as `chosen`.
    """
    return planned_for(names(lora), sizes)


@functools.lru_cache(maxsize=64)
def planned_for(named: Names, sizes: Shape) -> tuple[Target, ...]:
    """As `planned`."""
    return _chosen(named, inventory(sizes))


def chosen(lora: Lora, weights: Inventory) -> tuple[Target, ...]:
    """The weights that a recipe's lora section names.

    Raises:
        ModelError: a name matches nothing, or PEFT cannot train what it names.
    """
    return _chosen(names(lora), weights)


def _chosen(named: Names, weights: Inventory) -> tuple[Target, ...]:
    by_name = {target.matrix.name: target for target in _by_modules(named.modules, weights)}
    for name in named.parameters:
        matches = [matrix for matrix in (*weights.experts, *weights.routers) if _ends(matrix.name, name)]
        if not matches:
            raise ModelError(_unknown("lora.target_parameters", [name], [*weights.experts, *weights.routers]))
        for matrix in matches:
            by_name.setdefault(matrix.name, Target(matrix, parameter=True))
    targets = tuple(by_name.values())
    if named.dropout and any(target.parameter for target in targets):
        first = next(target.matrix.name for target in targets if target.parameter)
        raise ModelError(f"lora.lora_dropout is set together with an adapter on {first}; {NEEDS_NO_DROPOUT}")
    return targets


def _by_modules(targets: str | tuple[str, ...], weights: Inventory) -> list[Target]:
    if isinstance(targets, str):
        return _all_linear(weights) if targets.lower() == ALL_LINEAR else _by_pattern(targets, weights)
    if unknown := [name for name in targets if not any(_by_word(name, weights))]:
        raise ModelError(_unknown("lora.target_modules", unknown, weights.kinds()))
    every = [target for name in targets for target in _by_word(name, weights)]
    _need_pairs([_old_name(name, weights) for name in targets], weights)
    return list({target.matrix.name: target for target in every}.values())


def _all_linear(weights: Inventory) -> list[Target]:
    """Every linear module, and the experts if PEFT's all-linear includes them; never the router."""
    experts = [_expert(matrix, weights) for matrix in weights.experts] if weights.renamed else []
    return [*(Target(matrix) for matrix in weights.linears if not _hidden(matrix, weights)), *experts]


def _expert(matrix: Linear, weights: Inventory) -> Target:
    """An expert parameter selected by its old names: if it joins several of them, it gets the rank of all of them."""
    times = sum(new == kind_of(matrix) for new in (weights.renamed or {}).values())
    return Target(matrix, parameter=True, times=max(times, 1))


def _hidden(matrix: Linear, weights: Inventory) -> bool:
    """Whether PEFT takes the name of a module for the experts', so that the module itself cannot be named."""
    return kind_of(matrix) in (weights.renamed or {})


def _by_word(name: str, weights: Inventory) -> Iterator[Target]:
    """The weights that one name of a list selects, by PEFT's rule: those whose name ends in it."""
    renamed = weights.renamed or {}
    if (old := _old_name(name, weights)) is not None:
        yield from (_expert(matrix, weights) for matrix in weights.experts if kind_of(matrix) == renamed[old])
        yield from (Target(matrix, parameter=True) for matrix in weights.routers if kind_of(matrix) == renamed[old])
        return
    modules = [matrix for matrix in (*weights.linears, *weights.others) if _ends(matrix.name, name)]
    yield from map(Target, modules)
    if not modules:  # PEFT has a field of its own for parameters; qkit accepts them in either field
        parameters = (*weights.experts, *weights.routers)
        yield from (
            Target(m, parameter=True) for m in parameters if _ends(m.name, name) or _ends(m.name, f"{name}.weight")
        )


def _old_name(name: str, weights: Inventory) -> str | None:
    return next((old for old in weights.renamed or {} if _ends(name, old)), None)


def _need_pairs(old_names: Iterable[str | None], weights: Inventory) -> None:
    """Raise ModelError if gate is named without up, or up without gate, and both are one parameter."""
    given, renamed = set(old_names), weights.renamed or {}
    for parameter in set(renamed.values()):
        parts = {old for old in renamed if renamed[old] == parameter}
        if 0 < len(parts & given) < len(parts):
            raise ModelError(
                f"lora.target_modules names {', '.join(sorted(parts & given))} without {', '.join(sorted(parts - given))}: in this "
                f"model they are one parameter, {parameter}; name both, or neither"
            )


# --- a regular expression -----------------------------------------------------------------------------------------------


def _by_pattern(pattern: str, weights: Inventory) -> list[Target]:
    """The weights whose full name matches; experts by their own names, or by all of their old names."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ModelError(
            f"lora.target_modules={pattern!r} is not a valid regular expression ({error}); write names as a list"
        ) from None
    modules = [m for m in (*weights.linears, *weights.others) if compiled.fullmatch(m.name)]
    experts = _experts_by_pattern(compiled, weights)
    routers = [
        m for m in weights.routers if compiled.fullmatch(m.name) or compiled.fullmatch(m.name.removesuffix(".weight"))
    ]
    targets = [
        *(Target(m) for m in modules if not _hidden(m, weights)),
        *experts,
        *(Target(m, parameter=True) for m in routers),
    ]
    if not targets:
        example = next(iter(weights.linears or weights.others)).name
        raise ModelError(
            f"lora.target_modules={pattern!r} matches nothing: a string is a regular expression for the full name, such as {example}; "
            f"write names as a list, [{pattern}]. {_available(weights.kinds())}"
        )
    _refuse_others(pattern, targets, weights)
    return targets


def _experts_by_pattern(compiled: re.Pattern[str], weights: Inventory) -> list[Target]:
    experts = []
    for matrix in weights.experts:
        folder = matrix.name.rpartition(".")[0]
        old_names = [f"{folder}.{old}" for old, new in (weights.renamed or {}).items() if new == kind_of(matrix)]
        hits = [name for name in old_names if compiled.fullmatch(name)]
        if compiled.fullmatch(matrix.name) or (old_names and len(hits) == len(old_names)):
            experts.append(_expert(matrix, weights) if old_names else Target(matrix, parameter=True))
        elif hits:
            _need_pairs([name.rpartition(".")[2] for name in hits], weights)
    return experts


def _refuse_others(pattern: str, targets: Sequence[Target], weights: Inventory) -> None:
    """Raise ModelError if a pattern matches the head, or modules on which PEFT cannot put an adapter."""
    if any(target.matrix.name == "lm_head" for target in targets):
        raise ModelError(
            f"lora.target_modules={pattern!r} matches lm_head, whose adapter would never be trained, because the loss uses the head's own "
            "weights; leave it out, or write all-linear"
        )
    if weights.experts:  # then PEFT is given names and not the pattern
        return
    if wrong := [name for name in weights.rest if re.fullmatch(pattern, name)]:
        raise ModelError(
            f"lora.target_modules={pattern!r} matches {len(wrong)} modules that are not linear, which peft refuses; the first is "
            f"{wrong[0]}. End the pattern with the names to select, such as {pattern}\\.({'|'.join(weights.kinds()[:2])}), or write all-linear"
        )


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _unknown(field: str, unknown: Sequence[str], known: Sequence[str | Linear]) -> str:
    kinds = dict.fromkeys(entry if isinstance(entry, str) else kind_of(entry) for entry in known)
    return f"{field} names {', '.join(unknown)}, which this model does not have. {_available([*kinds])}"


def _available(kinds: Sequence[str]) -> str:
    return f"It has {', '.join(kinds)}" if kinds else "It has no experts and no router"


# --- notes for a plan ---------------------------------------------------------------------------------------------------


def remarks(lora: Lora, sizes: Shape) -> Iterator[str]:
    """Notes on a mixture of experts: which of its parts get no adapter.

    Raises:
        ModelError: as `planned`.
    """
    weights, trained = inventory(sizes), {target.matrix.name for target in planned(lora, sizes)}
    for subject, parameters in (("experts get", weights.experts), ("router gets", weights.routers)):
        if parameters and not any(matrix.name in trained for matrix in parameters):
            kinds = ", ".join(dict.fromkeys(kind_of(matrix) for matrix in parameters))
            yield f"The {subject} no adapter; lora.target_parameters=[{kinds}] adds one."
    hidden = [matrix for matrix in weights.linears if _hidden(matrix, weights)]
    if hidden:
        kinds = ", ".join(dict.fromkeys(kind_of(matrix) for matrix in hidden))
        yield (
            f"{len(hidden)} modules outside the experts ({kinds}; the first is {hidden[0].name}) get no adapter, because peft takes these "
            "names for the experts'."
        )


# --- for PEFT -----------------------------------------------------------------------------------------------------------


@contextmanager
def patterns_of_parameters() -> Iterator[None]:
    """Suppress PEFT's warning about rank and alpha patterns of parameters while it builds a model: it checks them against modules only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
        yield


def for_peft(lora: Lora, model: PreTrainedModel) -> dict[str, Any]:
    """The fields of LoraConfig that select what is trained in this model.

    Raises:
        ModelError: as `chosen`.
    """
    weights = inventory_of(model)
    targets = chosen(lora, weights)
    if not weights.experts:
        modules = lora.target_modules
        return {"target_modules": modules if isinstance(modules, str) else list(modules)}
    linears = [target.matrix for target in targets if not target.parameter]
    parameters = [target.matrix for target in targets if target.parameter]
    fields: dict[str, Any] = {
        "target_modules": _short_names(linears, (*weights.linears, *weights.others)),
        "target_parameters": _short_names(parameters, (*weights.experts, *weights.routers)),
    }
    higher = {_pattern(target.matrix): target.times for target in targets if target.times > 1}
    fields["rank_pattern"] = {pattern: lora.r * times for pattern, times in higher.items()}
    fields["alpha_pattern"] = {pattern: lora.lora_alpha * times for pattern, times in higher.items()}
    return {name: value for name, value in fields.items() if value or name == "target_modules"}


def _pattern(matrix: Linear) -> str:
    return rf".*\.{re.escape(kind_of(matrix))}"


def _short_names(selected: Sequence[Linear], every: Sequence[Linear]) -> list[str]:
    """Names for PEFT: one name for a kind that is selected in every layer, full names otherwise."""
    names, kinds = {matrix.name for matrix in selected}, {kind_of(matrix) for matrix in selected}
    whole = {kind for kind in kinds if all(m.name in names for m in every if _ends(m.name, kind))}
    return sorted({kind_of(m) if kind_of(m) in whole else m.name for m in selected})
