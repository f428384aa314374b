"""Wheels of a few lines, made for the tests."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

MakeWheel = Callable[..., Path]


@pytest.fixture
def make_wheel(tmp_path: Path) -> MakeWheel:
    """Return a function that writes a wheel which pip accepts: name, version, tag, lines of METADATA."""

    def make(
        name: str, version: str = "1.0", *, tag: str = "py3-none-any", lines: Sequence[str] = (), folder: str = "wheels"
    ) -> Path:
        stem = f"{name.replace('-', '_')}-{version}"
        path = tmp_path / folder / f"{stem}-{tag}.whl"
        path.parent.mkdir(exist_ok=True)
        info = f"{stem}.dist-info"
        metadata = "\n".join(["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}", *lines])
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"{info}/METADATA", f"{metadata}\n\nA package of the tests.\n")
            archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
            archive.writestr(f"{info}/RECORD", f"{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
        return path

    return make
