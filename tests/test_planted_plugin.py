"""``ultrazoo check`` finds faults in a plugin's kernel that the plugin's own samples do not show."""

from __future__ import annotations

import planted_plugin
import pytest

from ultrazoo.ops import build

try:
    build.find_compiler()
except build.BuildError as error:
    pytest.skip(error.reason, allow_module_level=True)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return planted_plugin.run(tmp_path_factory.mktemp("planted") / planted_plugin.NAME)


def test_the_plugin_without_a_fault_passes(found: dict[str, list[str]]) -> None:
    assert found[""] == []


@pytest.mark.parametrize("fault", [fault.name for fault in planted_plugin.FAULTS])
def test_a_fault_is_found_by_the_thin_samples_and_by_a_law_on_the_kernel(
    found: dict[str, list[str]], fault: str
) -> None:
    assert "op samples: suffice" in found[fault]
    assert [check for check in found[fault] if "compiled law: " in check]
