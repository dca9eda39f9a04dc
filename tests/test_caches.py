"""Code is loaded only from folders that nobody but its user and root can change."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import tempfile
from pathlib import Path

import pytest
from cli_parts import call
from test_build import lines

from ultrazoo import caches
from ultrazoo.ops import build
from ultrazoo.verdicts import verdict_path

__all__ = ["lines"]
COMPILER = """#!/bin/sh
for last; do :; done
echo "$@" > "$last"
"""
OTHER = 54321
pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs owners and modes")


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files, and warnings that are given again."""
    (tmp_path / "tmp").mkdir(mode=0o700)
    (tmp_path / "tmp").chmod(0o1777)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    caches._warn.cache_clear()
    return tmp_path / "tmp"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of kernels with a library and an object."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = caches.private_folder("kernels")
    for name in ("key/library.so", "objects/one.o"):
        (folder / name).parent.mkdir(mode=0o700)
        (folder / name).touch(0o600)
    return folder


@pytest.fixture
def quick_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that writes its arguments where it should write code, and an empty cache."""
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("ULTRAZOO_CUDA", "0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new/cache"))
    monkeypatch.setattr(build, "AT_INSTALL", tmp_path / "missing.so")


@pytest.mark.usefixtures("quick_build")
def test_new_folders_and_libraries_are_of_their_user_alone() -> None:
    before = os.umask(0)
    try:
        found = build.library()
    finally:
        os.umask(before)
    for path in (*[*found.parents][:5], found.parents[1] / "objects"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700, path
    assert not stat.S_IMODE(found.stat().st_mode) & 0o077
    assert not caches.untrusted(found) and build.library() == found, "what was made is not discarded"
    assert all(not caches.untrusted(path) for path in (found.parents[1] / "objects").glob("*.o"))


@pytest.mark.usefixtures("quick_build")
def test_a_planted_library_is_not_loaded_but_built_again(lines: pytest.LogCaptureFixture) -> None:
    found = build.library()
    planted = found.read_bytes() + b"planted"
    found.write_bytes(planted)
    record = json.loads(found.with_name("build.json").read_text())
    found.with_name("build.json").write_text(json.dumps(record | {"sha256": hashlib.sha256(planted).hexdigest()}))
    assert build.library().read_bytes() == planted, "the record is all that the contents are compared with"
    found.parent.chmod(0o777)
    assert build.library() == found and found.read_bytes() != planted
    assert f"{found.parent} can be written by others (mode 0777)" in lines.text


@pytest.mark.parametrize("loose", ["..", ".", "key", "key/library.so", "objects", "objects/one.o"])
@pytest.mark.parametrize("mode", [0o020, 0o002])
def test_what_others_can_write_is_discarded(
    cache: Path, loose: str, mode: int, lines: pytest.LogCaptureFixture
) -> None:
    path = Path(os.path.normpath(cache / loose))
    path.chmod(0o700 | mode)
    assert caches.private_folder("kernels") == cache and not list(cache.iterdir())
    assert not caches.untrusted(cache) and [path.name for path in cache.parent.iterdir()] == ["kernels"]
    (warning,) = [record.getMessage() for record in lines.records]
    assert f"{path} can be written by others (mode 07" in warning and "is discarded and made again" in warning


@pytest.mark.skipif(os.name == "posix" and os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("whose", [".", "key", "key/library.so"])
def test_what_belongs_to_someone_else_is_discarded(cache: Path, whose: str, lines: pytest.LogCaptureFixture) -> None:
    os.chown(cache / whose, OTHER, OTHER)
    assert caches.private_folder("kernels") == cache and not list(cache.iterdir()) and not caches.untrusted(cache)
    assert f"{cache / whose} belongs to user {OTHER}" in lines.text


def test_below_a_folder_that_others_can_write_another_place_is_taken(
    cache: Path, temporary: Path, lines: pytest.LogCaptureFixture
) -> None:
    above = cache.parents[1]
    above.chmod(0o777)
    mine = temporary / f"ultrazoo-{os.geteuid()}"
    assert caches.private_folder("kernels") == mine / "kernels" and stat.S_IMODE(mine.stat().st_mode) == 0o700
    (warning,) = [record.getMessage() for record in lines.records if record.levelname == "WARNING"]
    assert f"{above} can be written by others (mode 0777)" in warning and "XDG_CACHE_HOME" in warning
    above.chmod(0o1777)  # others cannot rename what is ours there
    assert caches.private_folder("kernels") == cache and (cache / "key/library.so").exists()


@pytest.mark.skipif(os.name == "posix" and os.geteuid() != 0, reason="only root can give files away")
def test_where_no_place_is_safe_the_reason_and_the_fix_are_clear(cache: Path, temporary: Path) -> None:
    cache.parents[1].chmod(0o777)
    squatted = temporary / f"ultrazoo-{os.geteuid()}"
    squatted.mkdir()
    os.chown(squatted, OTHER, OTHER)
    with pytest.raises(build.BuildError, match=r"no folder is safe .*/cache can be written by others") as caught:
        build.cache_folder()
    assert "XDG_CACHE_HOME" in caught.value.fix


def test_what_another_process_deletes_meanwhile_is_no_fault(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "dangling.so").symlink_to(cache / "nowhere")
    monkeypatch.setattr(os, "walk", lambda *_, **__: [(str(cache), ["new-gone"], ["gone.o", "dangling.so"])])
    assert caches.private_folder("kernels") == cache and (cache / "key/library.so").exists()


def test_a_link_into_a_folder_of_others_is_not_followed(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (cache / "key").rename(tmp_path / "shared/key")
    (cache / "key").symlink_to(tmp_path / "shared/key")
    assert (caches.private_folder("kernels") / "key/library.so").exists()
    (tmp_path / "shared").chmod(0o777)
    assert not list(caches.private_folder("kernels").iterdir())
    assert (tmp_path / "shared/key/library.so").exists(), "only the link is deleted"


def test_without_a_home_folder_the_temporary_files_serve(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, lines: pytest.LogCaptureFixture
) -> None:
    def missing() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", missing)
    mine = temporary / f"ultrazoo-{os.geteuid()}"
    assert caches.cache_home() == mine and build.cache_folder() == mine / "kernels"
    assert verdict_path("core").is_relative_to(mine)
    from ultrazoo.data.cache import default_cache_dir

    assert default_cache_dir() == mine / "data"
    assert [record.levelno for record in lines.records if "no home folder" in record.getMessage()] == [logging.WARNING]


def test_a_verdict_that_others_can_write_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ultrazoo import __version__

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = verdict_path("core")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"version": __version__, "ultrazoo": __version__, "passed": True}))
    for mode, state in ((0o644, "passed"), (0o666, "unreadable")):
        path.chmod(mode)
        assert call("plugins", "--json") == 0
        (found,) = [plugin for plugin in json.loads(capsys.readouterr().out) if plugin["name"] == "core"]
        assert found["check"]["state"] == state
    assert "can be written by others" in found["check"]["reason"]
