"""Settings of the benchmark suite: what its tables show."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Sort by time within a group, and show medians with their spread."""
    config.option.benchmark_sort = "median"
    config.option.benchmark_columns = ["median", "iqr", "rounds"]
