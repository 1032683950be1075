"""What the sections of a recipe have in common: their base class, and types of fields."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

Positive = Annotated[int, Field(gt=0)]
Limit = Annotated[float, Field(ge=0)] | None
Fraction = Annotated[float, Field(ge=0, le=1)]
Dtype = Literal["bfloat16", "float16", "float32"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _compiled(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise PydanticCustomError("pattern", "not a regular expression: {why}", {"why": str(error)}) from None
    return pattern


Pattern = Annotated[str, AfterValidator(_compiled)]


class Section(BaseModel):
    """Base of every section: unknown keys are errors, and a loaded recipe does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Reject booleans for numbers: pydantic would read true as 1."""
        kinds = set(_kinds(cls.model_fields[str(info.field_name)].annotation))
        given = value if isinstance(value, list | tuple) else [value]
        if kinds & {int, float} and bool not in kinds and any(isinstance(item, bool) for item in given):
            raise PydanticCustomError("number", "must be a number, not true or false")
        return value


def _kinds(annotation: Any) -> Iterator[Any]:
    """All types in an annotation."""
    yield annotation
    for inner in get_args(annotation):
        yield from _kinds(inner)
