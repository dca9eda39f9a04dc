"""The tests are those of an installed plugin: `pip install -e '.[test]'`."""

import importlib.metadata

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Say what to do where the plugin is not installed, before a registry without it is built."""
    try:
        importlib.metadata.distribution("ultrazoo-embbert")
    except importlib.metadata.PackageNotFoundError:
        raise pytest.UsageError(
            "ultrazoo-embbert is not installed; run: pip install -e plugins/ultrazoo-embbert"
        ) from None
