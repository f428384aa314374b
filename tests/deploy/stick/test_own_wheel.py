"""EchoQuad's own wheel: given, built from the checkout, or put together again from what is installed."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib import util
from pathlib import Path

import pytest

from echoquad_deploy.stick import own_wheel as module
from echoquad_deploy.stick.errors import WheelhouseError
from echoquad_deploy.stick.own_wheel import find_checkout, make_own_wheel, repack_installed
from echoquad_deploy.stick.wheel_file import WheelFile
from echoquad_runtime._version import __version__

ROOT = Path(__file__).parents[3]


@pytest.fixture
def installed(make_wheel: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Return a wheel of pure Python and the folder in which pip has installed it."""
    scripts = b"[console_scripts]\nrepackable = repackable:main\n"
    files = {
        "repackable/data/page.html": b"<p>\xc3\xa9</p>\r\n",
        "repackable-1.5.dist-info/entry_points.txt": scripts,
        "repackable-1.5.dist-info/licenses/LICENSE": b"text",
    }
    wheel = make_wheel(tmp_path / "wheels", "repackable", "1.5", requires=["numpy"], extras=["cpu"], files=files)
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", site, wheel]
    subprocess.run([str(word) for word in command], check=True, capture_output=True)
    monkeypatch.syspath_prepend(str(site))
    return wheel, site


def _content(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name) for name in archive.namelist()}


def test_repacked_wheel_has_the_files_of_the_one_that_was_installed(
    installed: tuple[Path, Path], tmp_path: Path
) -> None:
    wheel, _ = installed
    repacked = repack_installed(tmp_path / "out", "repackable")
    assert repacked.path.name == wheel.name
    old, new = _content(wheel), _content(repacked.path)
    record = "repackable-1.5.dist-info/RECORD"
    rows = [sorted(content.pop(record).decode().split()) for content in (old, new)]
    assert new == old
    assert rows[0] == rows[1]
    again = repack_installed(tmp_path / "again", "repackable")
    assert again.path.read_bytes() == repacked.path.read_bytes()


@pytest.mark.slow
def test_repacked_wheel_installs(installed: tuple[Path, Path], tmp_path: Path) -> None:
    repacked = repack_installed(tmp_path / "out", "repackable")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", tmp_path / "new"]
    subprocess.run([str(word) for word in [*command, repacked.path]], check=True, capture_output=True)
    assert (tmp_path / "new" / "repackable" / "data" / "page.html").read_bytes() == b"<p>\xc3\xa9</p>\r\n"
    assert (tmp_path / "new" / "bin" / "repackable").is_file()


def test_installed_file_that_was_changed_or_removed_is_refused(installed: tuple[Path, Path], tmp_path: Path) -> None:
    page = installed[1] / "repackable" / "data" / "page.html"
    page.write_bytes(b"patched")
    with pytest.raises(WheelhouseError, match=r"repackable.data.page\.html: an installed file was changed"):
        repack_installed(tmp_path / "out", "repackable")
    page.unlink()
    with pytest.raises(WheelhouseError, match="an installed file is missing"):
        repack_installed(tmp_path / "out", "repackable")


def test_package_that_is_not_installed_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(WheelhouseError, match=r"nosuchpackage is not installed as a package; .*--wheel"):
        repack_installed(tmp_path / "out", "nosuchpackage")


def test_package_with_compiled_code_is_not_repacked(tmp_path: Path) -> None:
    with pytest.raises(WheelhouseError, match="not installed from a wheel of pure Python"):
        repack_installed(tmp_path / "out", "numpy")


def test_given_wheel_is_taken_as_it_is(own_wheel: Path, tmp_path: Path) -> None:
    assert make_own_wheel(tmp_path / "out", own_wheel).path == own_wheel
    assert not (tmp_path / "out").exists()


def test_wheel_of_another_package_is_refused(make_wheel: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(WheelhouseError, match="a wheel of numpy; expected one of echoquad"):
        make_own_wheel(tmp_path / "out", make_wheel(tmp_path, "numpy"))
    with pytest.raises(WheelhouseError, match="cannot be read as a wheel"):
        make_own_wheel(tmp_path / "out", tmp_path / "echoquad-1.0-py3-none-any.whl")


def test_wheel_is_built_from_the_checkout_that_runs(tmp_path: Path) -> None:
    if util.find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed")
    assert find_checkout() == ROOT
    wheel = make_own_wheel(tmp_path / "out")
    assert (wheel.name, wheel.version) == ("echoquad", __version__)
    assert {"cpu", "serve", "dicom", "deploy"} <= wheel.extras
    content = _content(wheel.path)
    for name, path in {
        "echoquad_deploy/stick/packer.py": ROOT / "export/echoquad_deploy/stick/packer.py",
        "echoquad/cli/commands/pack.py": ROOT / "echoquad/cli/commands/pack.py",
    }.items():
        assert content[name] == path.read_bytes()


def test_without_a_checkout_the_installed_files_are_taken(
    installed: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "__file__", str(tmp_path / "site" / "echoquad_deploy" / "stick" / "own_wheel.py"))
    assert find_checkout() is None
    monkeypatch.setattr(module, "repack_installed", lambda folder: WheelFile(installed[0]))
    assert make_own_wheel(tmp_path / "out").path == installed[0]
