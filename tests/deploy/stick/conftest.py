"""Fixtures for sticks: a registry of small wheels on disk, keys, and a packed stick."""

from __future__ import annotations

import base64
import hashlib
import shutil
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from echoquad_deploy.stick.packer import PackedStick, pack_stick
from echoquad_deploy.stick.target import Target

pytest.importorskip("packaging")

EXTRAS = ("cpu", "gpu", "serve", "sign")

MakeWheel = Callable[..., Path]


def build_wheel(
    folder: Path,
    name: str,
    version: str = "1.0",
    *,
    tag: str = "py3-none-any",
    requires: Sequence[str] = (),
    extras: Sequence[str] = (),
    fields: Sequence[str] = (),
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """Write a wheel with one module and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    metadata = ["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}", *fields]
    metadata += [f"Provides-Extra: {extra}" for extra in extras] + [f"Requires-Dist: {line}" for line in requires]
    content = {
        f"{name}/__init__.py": b"",
        f"{info}/METADATA": "\n".join(metadata).encode() + b"\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: {tag}\n".encode(),
        **({f"{info}/licenses/LICENSE": b"Do what you want.\n"} if files is None else files),
    }
    rows = [
        f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b'=').decode()},{len(data)}"
        for path, data in content.items()
    ]
    content[f"{info}/RECORD"] = "\n".join([*rows, f"{info}/RECORD,,", ""]).encode()
    path = folder / f"{name}-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in content.items():
            archive.writestr(member, data)
    return path


@pytest.fixture(scope="session")
def make_wheel() -> MakeWheel:
    """Return `build_wheel(folder, name, version, tag=..., requires=..., extras=..., fields=..., files=...)`."""
    return build_wheel


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the wheels that the small EchoQuad needs. Shared: tests must not change it."""
    folder = tmp_path_factory.mktemp("registry")
    for architecture in ("x86_64", "aarch64"):
        build_wheel(folder, "onnxruntime", tag=f"cp312-cp312-manylinux_2_28_{architecture}", requires=["numpy"])
        build_wheel(
            folder, "cryptography", tag=f"cp311-abi3-manylinux2014_{architecture}.manylinux_2_17_{architecture}"
        )
    build_wheel(folder, "numpy", fields=["License-Expression: BSD-3-Clause"])
    build_wheel(folder, "onlyold")
    build_wheel(folder, "pip")
    build_wheel(folder, "starlette", requires=["onlyold; python_version < '3.12'"], files={})
    return folder


@pytest.fixture(scope="session")
def own_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a wheel that is called echoquad and needs little."""
    requires = [
        "numpy",
        "onnxruntime; extra == 'cpu'",
        "starlette; extra == 'serve'",
        "onnxruntime-gpu; extra == 'gpu'",
    ]
    return build_wheel(
        tmp_path_factory.mktemp("own"),
        "echoquad",
        "0.9.0",
        requires=requires,
        extras=EXTRAS,
        fields=["Requires-Python: >=3.11"],
    )


def offline_pip(registry: Path) -> dict[str, str]:
    return {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(registry),
        "PIP_CONFIG_FILE": "/dev/null" if sys.platform != "win32" else "nul",
        "PIP_EXTRA_INDEX_URL": "",
    }


@pytest.fixture(scope="session")
def pip_settings(registry: Path) -> dict[str, str]:
    """Return environment variables with which pip knows the folder `registry` and no network."""
    return offline_pip(registry)


@pytest.fixture
def offline(pip_settings: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make pip know the folder `registry` and no network; return that folder."""
    for name, value in pip_settings.items():
        monkeypatch.setenv(name, value)
    return Path(pip_settings["PIP_FIND_LINKS"])


@pytest.fixture(scope="session")
def packed(
    tiny_bundle: Path,
    own_wheel: Path,
    keys: Path,
    pip_settings: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> PackedStick:
    """Return a signed stick for aarch64 and Python 3.12. Shared: tests must not change it."""
    out = tmp_path_factory.mktemp("packed") / "stick"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in pip_settings.items():
            patch.setenv(name, value)
        return pack_stick(tiny_bundle, out, Target("aarch64", "3.12"), key=keys / "ours.pem", wheel=own_wheel)


@pytest.fixture
def stick(packed: PackedStick, tmp_path: Path) -> Path:
    """Return a copy of the signed stick that a test may change."""
    return Path(shutil.copytree(packed.folder, tmp_path / "stick"))
