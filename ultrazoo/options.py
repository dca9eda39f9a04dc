"""What the sections of a config and the options of a block have in common."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

LARGEST = 2**31 - 1
"""Largest whole number of a field that sets no limit of its own: sizes, counts, intervals."""


class Options(BaseModel):
    """Frozen values; unknown keys, NaN, infinities and whole numbers beyond ``LARGEST`` are errors.

    A field with a limit of its own (``Field(le=...)``) is held to that one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _no_larger(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, int) and abs(value) > LARGEST:
            field = cls.model_fields[str(info.field_name)]
            if not any(hasattr(limit, "le") or hasattr(limit, "lt") for limit in field.metadata):
                raise ValueError(f"got {value}, expected at most {LARGEST}; leave the field out for its default")
        return value
