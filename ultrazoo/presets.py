"""Where the built-in presets lie: inside an installed package, or in the repository of an editable install."""

from __future__ import annotations

from pathlib import Path

from ultrazoo.spec import PresetSpec


def built_in() -> list[PresetSpec]:
    """Return the presets under configs/; the first comment line of each file is its summary."""
    package = Path(__file__).parent
    folder = next((path for path in (package / "configs", package.parent / "configs") if path.is_dir()), None)
    files = sorted(folder.glob("*.yaml")) if folder else []
    return [PresetSpec(name=path.stem, path=path, summary=_summary(path)) for path in files]


def _summary(path: Path) -> str:
    with path.open(encoding="utf-8-sig") as file:
        comments = (line[1:].strip() for line in file if line.startswith("#") and "yaml-language-server" not in line)
        return next(comments, "")
