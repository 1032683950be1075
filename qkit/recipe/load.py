"""A recipe from its file: YAML, `--set` overrides, and every problem at once with its file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from qkit.core.errors import LINE, RecipeError, nearest, short
from qkit.recipe.checks import clashes
from qkit.recipe.schema import Recipe, Section

if TYPE_CHECKING:
    from qkit.recipe.checks import Key


PROBLEMS = 20  # of a recipe, how many a message names: a file of another kind has thousands


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `a.b=c` overrides.

    Raises:
        RecipeError: naming every problem: file, line, key, what is wrong, the nearest valid key.
    """
    if not path.is_file():
        raise RecipeError(f"{path}: no such recipe; `qkit run recipes/quickstart.yaml` is one to start from")
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not YAML: {short(error, LINE)}") from None
    if twice := list(_twice(node)):
        raise RecipeError(
            "\n".join(f"{path}:{line}: {short(repr(key))} stands there twice; keep one" for key, line in twice)
        )
    if not isinstance(raw, dict):
        raise RecipeError(
            f"{path}: a recipe is a mapping of sections (model, data, train ...), this is {short(repr(raw))}"
        )
    return from_dict(raw, overrides, str(path), {key: f"{path}:{line}" for key, line in _lines(node)})


def from_dict(
    raw: dict[str, Any], overrides: Sequence[str], name: str, origins: dict[Key, str] | None = None
) -> Recipe:
    """A recipe from its sections, with overrides. `origins`: where each key was written; `name`: what to call the rest.

    Raises:
        RecipeError: as `load`.
    """
    origins = dict(origins or {})
    for text in overrides:
        origins.update(dict.fromkeys(override(raw, text), "--set"))
    return _validated(raw, origins, name)


def _validated(raw: dict[str, Any], origins: dict[Key, str], default: str) -> Recipe:
    """The recipe, or one RecipeError with all problems: of form first, then of values that clash."""
    problems: list[str] = []
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        details = error.errors()
        problems = [_describe(detail, origins, default) for detail in details]
        partial = _without(raw, [detail["loc"] for detail in details])
        recipe = _or_none(partial)  # type: ignore[assignment]
    if recipe is not None:
        problems += [f"{_origin(key, origins, default)}: {text}" for key, text in clashes(recipe)]
    if problems:
        more = [f"and {len(problems) - PROBLEMS:,} more"] if len(problems) > PROBLEMS else []
        raise RecipeError("\n".join([*problems[:PROBLEMS], *more]))
    return recipe


def _describe(detail: ErrorDetails, origins: dict[Key, str], default: str) -> str:
    """One line for one problem that pydantic found."""
    loc = detail["loc"]
    dotted = short(".".join(map(str, loc)))
    if detail["type"] == "extra_forbidden":
        siblings = list(_fields(loc[:-1]))
        problem = f"unknown key {dotted!r}{nearest(str(loc[-1]), siblings)}"
    elif detail["type"] == "missing":
        problem = f"{dotted!r} is missing"
    else:
        problem = f"{dotted}: {detail['msg']}, got {short(repr(detail['input']))}"
    return f"{_origin(loc, origins, default)}: {problem}"


def _fields(loc: Key) -> Iterator[str]:
    """The valid keys at a place in the recipe."""
    section: Any = Recipe
    for key in loc:
        if isinstance(key, int) or key not in section.model_fields:  # a place in a list, or a name of the user's own
            continue
        annotation = section.model_fields[key].annotation
        args = [a for a in getattr(annotation, "__args__", ()) if isinstance(a, type) and issubclass(a, Section)]
        section = args[0] if args else annotation
    yield from section.model_fields


def _origin(loc: Key, origins: dict[Key, str], default: str) -> str:
    """Where a key was written; for a key that was not, the nearest section above it."""
    for length in range(len(loc), 0, -1):
        if loc[:length] in origins:
            return origins[loc[:length]]
    return default


def _lines(node: yaml.Node | None, prefix: Key = ()) -> Iterator[tuple[Key, int]]:
    """Every key of a YAML document with its line, counted from 1."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*prefix, key.value), key.start_mark.line + 1
            yield from _lines(value, (*prefix, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*prefix, index), value.start_mark.line + 1
            yield from _lines(value, (*prefix, index))


def _twice(node: yaml.Node | None) -> Iterator[tuple[str, int]]:
    """Keys that a mapping of a YAML document has again, of which only the last would count, with their lines."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                yield key.value, key.start_mark.line + 1
            seen |= {key.value} if isinstance(key, yaml.ScalarNode) else set()
            yield from _twice(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _twice(value)


def override(raw: dict[str, Any], text: str) -> list[Key]:
    """Write one `a.b=c` override into the raw recipe; the value is YAML. Returns the keys it set.

    Raises:
        RecipeError: it is not of this form.
    """
    dotted, equals, value = text.partition("=")
    shown = short(text)
    keys = dotted.split(".")
    if not equals or not all(keys):
        raise RecipeError(f"--set {shown}: write it as section.key=value, such as --set train.learning_rate=1e-5")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise RecipeError(f"--set {shown}: {short(repr(value))} is not YAML; quote it for the shell") from None
    where = raw
    for key in keys[:-1]:
        where = where.setdefault(key, {})
        if not isinstance(where, dict):
            raise RecipeError(f"--set {shown}: {short(repr(key))} is not a section")
    where[keys[-1]] = parsed
    return [tuple(keys)]


def _without(raw: dict[str, Any], locs: Sequence[Key]) -> dict[str, Any]:
    """A copy without the keys that were wrong, so that the rest can still be checked for clashes."""
    copy: dict[str, Any] = json.loads(json.dumps(raw, default=str))
    for loc in locs:
        where: Any = copy
        for key in loc[:-1]:
            where = where[key] if isinstance(where, dict) and key in where else {}
        if isinstance(where, dict):
            where.pop(loc[-1], None)
    return copy


def _or_none(raw: dict[str, Any]) -> Recipe | None:
    try:
        return Recipe.model_validate(raw)
    except ValidationError:
        return None
