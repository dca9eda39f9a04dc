"""One position of ``layer_pattern``: a mixer's name, or its name with options for the layers of that position."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

FORM = "expected a mixer's name, or its name with options, as in {block: mamba, d_state: 8}"


class BlockUse(BaseModel):
    """A block with options of its own, as in ``{block: mamba, d_state: 8}``."""

    model_config = ConfigDict(frozen=True, extra="allow")

    block: str

    @property
    def options(self) -> dict[str, Any]:
        """What stands beside ``block``."""
        return dict(self.model_extra or {})


def _read(given: Any) -> Any:
    """Refuse what is neither a name nor a mapping with ``block``; a mapping without options becomes the name."""
    if isinstance(given, str | BlockUse):
        return given
    if not isinstance(given, dict):
        raise ValueError(f"got {given!r}, {FORM}")
    if not isinstance(given.get("block"), str):
        what = f"the name {given['block']!r}" if "block" in given else f"{given!r} without 'block'"
        raise ValueError(f"got {what}, {FORM}")
    return given if len(given) > 1 else given["block"]


Layer = Annotated[str | BlockUse, BeforeValidator(_read)]
