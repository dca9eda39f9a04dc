"""Plants faults in a copy of csrc, which a switch turns on one at a time."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ultrazoo.ops import build


@dataclass(frozen=True)
class Fault:
    """``new`` stands for ``old`` in a file of csrc; ``fault`` in it is true while this one is turned on."""

    name: str
    op: str
    file: str
    old: str
    new: str
    caught_by: str = ""


def plant(faults: Sequence[Fault], csrc: Path, switch: str) -> None:
    """Copy csrc, with every fault in it.

    Args:
        faults: Fault number i is on while ``uz::fault`` is i, counted from 1.
        csrc: The copy's folder.
        switch: C++ that declares ``uz::fault``, for the end of common/types.h.
    """
    original = build.find_sources()
    assert original is not None
    shutil.copytree(original, csrc, dirs_exist_ok=True)
    for number, fault in enumerate(faults, start=1):
        path = csrc / fault.file
        text = path.read_text()
        assert fault.old in text, f"{fault.name}: {fault.file} has changed: no {fault.old!r} in it"
        head, tail = text.split(fault.old, 1)
        path.write_text(head + fault.new.replace("fault", f"(uz::fault == {number})") + tail)
    types = csrc / "common" / "types.h"
    types.write_text(types.read_text() + switch)
