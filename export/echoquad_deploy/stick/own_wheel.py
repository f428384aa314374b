"""EchoQuad's own wheel: built from the checkout, or put together again from the installed files."""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.util
import io
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Final

from echoquad_deploy.stick.errors import WheelhouseError
from echoquad_deploy.stick.wheel_file import WheelFile
from echoquad_deploy.stick.wheelhouse import run_pip
from echoquad_runtime.storage.atomic import make_folder, write_bytes

__all__ = ["find_checkout", "make_own_wheel", "repack_installed"]

_NAME: Final = "echoquad"
_INSTALLERS_OWN: Final = {"INSTALLER", "REQUESTED", "RECORD", "direct_url.json", "uv_cache.json"}
"""Files in ``.dist-info`` that an installer writes, and that no wheel holds."""


def make_own_wheel(folder: Path, given: Path | None = None) -> WheelFile:
    """Return a wheel of EchoQuad.

    Parameters
    ----------
    folder
        Where the wheel is written, unless one is given.
    given
        A wheel to take instead.

    Raises
    ------
    WheelhouseError
        If the given file is not a wheel of EchoQuad, the checkout cannot be built, or installed files were changed.
    RegistryError
        If the build needs a package that is not installed, and the registry cannot be reached.
    """
    if given is not None:
        wheel = WheelFile(given)
        if wheel.name != _NAME or not wheel.extras:
            raise WheelhouseError(f"{given.as_posix()}: a wheel of {wheel.name}; expected one of {_NAME}")
        return wheel
    checkout = find_checkout()
    if checkout is None:
        return repack_installed(folder)
    make_folder(folder)
    # An installed hatchling needs no network.
    isolation = [] if importlib.util.find_spec("hatchling") is None else ["--no-build-isolation"]
    run_pip(["wheel", "--no-deps", *isolation, "--wheel-dir", str(folder), str(checkout)], "EchoQuad itself")
    (path,) = folder.glob(f"{_NAME}-*.whl")
    return WheelFile(path)


def find_checkout() -> Path | None:
    """Return the folder of the source tree that this code runs from; None if it runs from an installed wheel."""
    folder = Path(__file__).resolve().parents[3]
    project = folder / "pyproject.toml"
    return folder if project.is_file() and f'name = "{_NAME}"' in project.read_text("utf-8") else None


def repack_installed(folder: Path, name: str = _NAME) -> WheelFile:
    """Write the wheel of an installed distribution of pure Python from its files, each compared with its hash.

    Parameters
    ----------
    folder
        Where the wheel is written.
    name
        The distribution.

    Raises
    ------
    WheelhouseError
        If it is not installed from a wheel, or a file is missing or was changed.
    """
    advice = "install EchoQuad again, or name a wheel with --wheel"
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        raise WheelhouseError(f"{name} is not installed as a package; {advice}") from None
    content: dict[str, bytes] = {}
    for entry in sorted(distribution.files or []):
        if ".." in entry.parts or entry.is_absolute() or "__pycache__" in entry.parts or entry.name in _INSTALLERS_OWN:
            continue  # a start script, bytecode or a note of the installer, which every installation makes for itself
        try:
            data = Path(str(entry.locate())).read_bytes()
        except OSError as error:
            raise WheelhouseError(f"{entry}: an installed file is missing ({error.strerror}); {advice}") from error
        if entry.hash is None or entry.hash.mode != "sha256" or entry.hash.value != _record_hash(data):
            raise WheelhouseError(f"{entry}: an installed file was changed after its installation; {advice}")
        content[entry.as_posix()] = data
    info = next((path.rpartition("/")[0] for path in content if path.endswith(".dist-info/WHEEL")), None)
    if info is None or b"Root-Is-Purelib: true" not in content[f"{info}/WHEEL"]:
        raise WheelhouseError(f"{name} is not installed from a wheel of pure Python; {advice}")
    content[f"{info}/RECORD"] = _record(content, f"{info}/RECORD")
    path = folder / f"{info.removesuffix('.dist-info')}-py3-none-any.whl"
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, data in content.items():
            entry_info = zipfile.ZipInfo(member, (2020, 2, 2, 0, 0, 0))  # the same bytes at any time
            entry_info.external_attr = 0o644 << 16
            archive.writestr(entry_info, data, zipfile.ZIP_DEFLATED)
    make_folder(folder)
    write_bytes(path, stream.getvalue())
    return WheelFile(path)


def _record_hash(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode("ascii")


def _record(content: dict[str, bytes], own_name: str) -> bytes:
    """Return the wheel's ``RECORD``: path, hash and size of each file."""
    stream = io.StringIO(newline="")
    rows = csv.writer(stream, lineterminator="\n")
    rows.writerows((path, f"sha256={_record_hash(data)}", len(data)) for path, data in content.items())
    rows.writerow((own_name, "", ""))
    return stream.getvalue().encode("utf-8")
