"""Loads a recipe: YAML, `--set` overrides, validation. All problems are reported at once, with file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from qkit.core.errors import LINE, Problem, RecipeError, nearest, short
from qkit.recipe.checks import clashes
from qkit.recipe.idle import CONLL_SUFFIXES, TEXT
from qkit.recipe.registry import task_defaults
from qkit.recipe.schema import Recipe
from qkit.recipe.section import Section

if TYPE_CHECKING:
    from qkit.recipe.checks import Key


JSON = ".json"  # of data, and perhaps of a recipe: YAML reads both
DATA_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".gz", *TEXT, *CONLL_SUFFIXES)
MAX_PROBLEMS = 20  # in a message: a file that is not a recipe has thousands


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `a.b=c` overrides.

    Raises:
        RecipeError: with every problem: file, line, key, what is wrong, the nearest valid key.
    """
    if not path.is_file():
        raise RecipeError(f"{path}: no such recipe; `qkit init --example quickstart` writes one to start from")
    if path.suffix.lower() in DATA_SUFFIXES:
        raise _is_data(path)
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not YAML: {short(error, LINE)}") from None
    duplicates = [
        Problem((key,), f"duplicate key {short(repr(key))}; keep one", f"{path}:{line}")
        for key, line in _duplicate_keys(node)
    ]
    if duplicates:
        raise _recipe_error(duplicates)
    if path.suffix.lower() == JSON and not (isinstance(raw, dict) and "model" in raw):
        raise _is_data(path)
    if not isinstance(raw, dict):
        raise RecipeError(
            f"{path}: a recipe must be a mapping of sections (model, data, train ...), got {short(repr(raw))}"
        )
    return from_dict(raw, overrides, str(path), {key: f"{path}:{line}" for key, line in _lines(node)})


def _is_data(path: Path) -> RecipeError:
    return RecipeError(f"{path}: is a data file, not a recipe; `qkit init {path}` writes a recipe for it")


def from_dict(
    raw: dict[str, Any], overrides: Sequence[str], name: str, origins: dict[Key, str] | None = None
) -> Recipe:
    """A recipe from a mapping of sections, with overrides. `origins`: file and line of each key; `name`: origin of keys without one.

    Raises:
        RecipeError: as `load`.
    """
    origins = dict(origins or {})
    for text in overrides:
        origins.update(dict.fromkeys(override(raw, text), "--set"))
    return _validated(task_defaults(raw), origins, name)


def _validated(raw: dict[str, Any], origins: dict[Key, str], default: str) -> Recipe:
    """Validate the fields first, then the combinations of values; raise one RecipeError with all problems."""
    problems: list[Problem] = []
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        details = error.errors()
        problems = [
            Problem(detail["loc"], _describe(detail), _origin(detail["loc"], origins, default)) for detail in details
        ]
        partial = _without(raw, [detail["loc"] for detail in details])
        recipe = _or_none(partial)  # type: ignore[assignment]
    if recipe is not None:
        problems += [Problem(key, message, _origin(key, origins, default)) for key, message in clashes(recipe)]
    if problems:
        raise _recipe_error(problems)
    return recipe


def _recipe_error(problems: Sequence[Problem]) -> RecipeError:
    rest = len(problems) - MAX_PROBLEMS
    lines = [*map(str, problems[:MAX_PROBLEMS]), *([f"and {rest:,} more"] if rest > 0 else [])]
    return RecipeError("\n".join(lines), problems=problems)


def _describe(detail: ErrorDetails) -> str:
    """The message for one error of pydantic."""
    loc = detail["loc"]
    dotted = short(".".join(map(str, loc)))
    if detail["type"] == "extra_forbidden":
        siblings = list(_fields(loc[:-1]))
        return f"unknown key {dotted!r}{nearest(str(loc[-1]), siblings)}"
    if detail["type"] == "missing":
        return f"{dotted!r} is missing"
    return f"{dotted}: {detail['msg']}, got {short(repr(detail['input']))}"


def _fields(loc: Key) -> Iterator[str]:
    """The valid keys at a location in the recipe."""
    section: Any = Recipe
    for key in loc:
        if isinstance(key, int) or key not in section.model_fields:  # a list index, or a user-defined name
            continue
        annotation = section.model_fields[key].annotation
        args = [a for a in getattr(annotation, "__args__", ()) if isinstance(a, type) and issubclass(a, Section)]
        section = args[0] if args else annotation
    yield from section.model_fields


def _origin(loc: Key, origins: dict[Key, str], default: str) -> str:
    """File and line of a key; for a key that is not in the file, of the nearest section above it."""
    for length in range(len(loc), 0, -1):
        if loc[:length] in origins:
            return origins[loc[:length]]
    return default


def _lines(node: yaml.Node | None, prefix: Key = ()) -> Iterator[tuple[Key, int]]:
    """Every key of a YAML document with its 1-based line."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*prefix, key.value), key.start_mark.line + 1
            yield from _lines(value, (*prefix, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*prefix, index), value.start_mark.line + 1
            yield from _lines(value, (*prefix, index))


def _duplicate_keys(node: yaml.Node | None) -> Iterator[tuple[str, int]]:
    """Keys that occur twice in a mapping, with the line of the second: PyYAML would silently keep the last."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                yield key.value, key.start_mark.line + 1
            seen |= {key.value} if isinstance(key, yaml.ScalarNode) else set()
            yield from _duplicate_keys(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _duplicate_keys(value)


def override(raw: dict[str, Any], text: str) -> list[Key]:
    """Apply one `a.b=c` override to the raw recipe; the value is YAML. Returns the keys that were set.

    Raises:
        RecipeError: the override is not of this form.
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
    """A copy without the invalid keys, so that the rest can still be checked for conflicts."""
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
