"""What is known of installed distributions, also where an installation is damaged."""

from __future__ import annotations

import importlib
import importlib.metadata
import re

from ultrazoo.errors import UltrazooError

UNKNOWN = "unknown"
ARRAYS = {"numpy": "1.26", "pyarrow": "16"}
"""Oldest versions that work together; as in pyproject.toml."""


class InstallationError(UltrazooError):
    """Packages are installed that do not work together."""


def version_of(distribution: str) -> str:
    """Return the version of an installed distribution; ``unknown`` where it or its METADATA is missing."""
    try:
        return importlib.metadata.version(distribution) or UNKNOWN
    except (importlib.metadata.PackageNotFoundError, KeyError, TypeError):
        return UNKNOWN


def name_and_version(distribution: importlib.metadata.Distribution) -> tuple[str, str] | None:
    """Return what the METADATA of a distribution says it is; None where that is missing."""
    try:
        name, version = distribution.name, distribution.version
    except (KeyError, TypeError):  # what importlib.metadata does then depends on the version of Python
        return None
    return (name, version) if name and version else None


def require_arrays() -> None:
    """Import numpy and pyarrow, which do not work together in every pair of versions.

    Raises:
        InstallationError: They do not.
    """
    found = {name: version_of(name) for name in ARRAYS}
    problem = "; ".join(
        f"expected {name} {oldest} or newer" for name, oldest in ARRAYS.items() if _older(found[name], oldest)
    )
    if not problem:  # a pyarrow that is too old would print pages before it fails
        try:
            for name in ARRAYS:
                importlib.import_module(name)
            return
        except (ImportError, AttributeError) as error:
            problem = f"they do not work together: {' '.join(str(error).split())[:200]}"
    versions = " and ".join(f"{name} {version}" for name, version in found.items())
    wanted = " ".join(f"'{name}>={oldest}'" for name, oldest in ARRAYS.items())
    raise InstallationError(f"got {versions}: {problem}; run: pip install -U {wanted}")


def _older(version: str, oldest: str) -> bool:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", text)[:2]]

    return version != UNKNOWN and numbers(version) < numbers(oldest)
