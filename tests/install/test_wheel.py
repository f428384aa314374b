"""Contents and metadata of the distribution files."""

from __future__ import annotations

import re
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

from echoquad import __version__

PACKAGES = {"echoquad", "echoquad_runtime", "echoquad_train", "echoquad_export", "echoquad_deploy", "echoquad_serve"}


def test_wheel_contains_only_the_packages(wheel: Path) -> None:
    assert wheel.name == f"echoquad-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    info = f"echoquad-{__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == PACKAGES | {info}
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    assert {f"echoquad_train/recipes/{name}.toml" for name in ("transfer", "scratch")} <= set(names)
    for name in ("install/install.sh", "install/install.ps1", "systemd/echoquad.service"):
        assert f"echoquad_deploy/{name}" in names
    assert f"{info}/licenses/LICENSE" in names
    endings = {Path(name).suffix for name in names if not name.startswith((info, "echoquad_deploy/"))}
    assert endings == {".css", ".html", ".j2", ".js", ".py", ".svg", ".toml", ".typed"}
    deployed = {name for name in names if name.startswith("echoquad_deploy/") and not name.endswith((".py", ".typed"))}
    assert {Path(name).suffix or Path(name).name for name in deployed} == {
        *(".conf", ".ps1", ".service", ".sh", "Containerfile")
    }
    assert not [name for name in names if re.search(r"\btest|conftest|\.pyc|\.partial", name)]
    assert wheel.stat().st_size < 1_050_000  # code only: 1,001 kB in November 2026


def test_wheel_contains_each_file_of_the_packages(wheel: Path) -> None:
    root = Path(__file__).parents[2]
    packages = ("runtime", "train", "export")
    folders = (
        root / "echoquad",
        root / "runtime" / "echoquad_serve",
        root / "export" / "echoquad_deploy",
        *(root / name / f"echoquad_{name}" for name in packages),
    )
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    files = [
        path for folder in folders for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    missing = [path for path in files if not any(path.as_posix().endswith(f"/{name}") for name in names)]
    assert missing == []


def test_wheel_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = f"echoquad-{__version__}.dist-info"
        metadata = HeaderParser().parsestr(archive.read(f"{info}/METADATA").decode())
        scripts = archive.read(f"{info}/entry_points.txt").decode()
    assert metadata["Name"] == "echoquad"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    extras = {"cpu", "gpu", "openvino", "train", "export", "sign", "ray", "all", "dev"}
    assert extras <= set(metadata.get_all("Provides-Extra"))
    bare = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(re.split(r"[<>=!]", line)[0] for line in bare) == ["numpy", "pillow", "rich", "typer"]
    assert "echoquad = echoquad.cli.framework.main:main" in scripts


def test_source_distribution_contains_tests_and_no_build_products(built: Path) -> None:
    (found,) = built.glob("*.tar.gz")
    with tarfile.open(found) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert {"pyproject.toml", "README.md", "LICENSE", "Makefile", "tests/conftest.py"} <= set(names)
    assert not [name for name in names if re.search(r"__pycache__|\.venv|\.git/|\.onnx$|\.safetensors$|^demo/", name)]
    assert found.stat().st_size < 3_000_000
