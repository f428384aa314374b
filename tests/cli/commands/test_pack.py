"""``echoquad pack``: the command line, and one line for each error."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from echoquad_deploy.stick.sums import write_sums

pytest.importorskip("packaging")


@pytest.fixture(scope="module")
def own_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a wheel that is called echoquad and needs nothing."""
    folder = tmp_path_factory.mktemp("wheel")
    _write_wheel(folder / "pip-1.0-py3-none-any.whl", "")  # every stick brings pip
    fields = "Provides-Extra: cpu\nProvides-Extra: serve\nRequires-Dist: absent; extra == 'serve'\n"
    return _write_wheel(folder / "echoquad-0.9.0-py3-none-any.whl", fields)


def _write_wheel(path: Path, fields: str) -> Path:
    name, version = path.name.split("-")[:2]
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n{fields}")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def test_stick_is_packed_and_checked(
    tiny_bundle: Path, own_wheel: Path, echoquad: Callable[..., Any], tmp_path: Path
) -> None:
    stick = tmp_path / "stick"
    command = ["pack", tiny_bundle, "--out", stick, "--target", "aarch64", "--python", "3.12", "--extras", "cpu"]
    ran = echoquad(*command, "--wheel", own_wheel, env=_offline(own_wheel))
    assert ran.out.startswith(f"packed 2 wheels and {tiny_bundle.as_posix()} for aarch64, Python 3.12: 0 MB in ")
    assert ran.out.endswith("; not signed; next: sh install.sh on the machine\n")
    assert "the stick is not signed; with --key PEM the machine can check whose it is" in ran.err
    assert "verifying the bundle\ndownloading the wheels for aarch64, Python 3.12\n" in ran.err
    checked = echoquad("pack", "--check", stick)
    assert checked.out.startswith(f"PASS {stick.as_posix()}: ")
    assert checked.out.endswith("EchoQuad 0.9.0 for aarch64, Python 3.12, bundle bundle; not signed\n")
    assert "public_key" not in ran.err
    (stick / "extra.txt").touch()
    assert echoquad("pack", "--check", stick, code=3).error[0] == "E_STICK"
    write_sums(stick)
    assert echoquad("pack", "--check", stick).code == 0


def test_configuration_that_does_not_require_the_signature_is_noted(
    tiny_bundle: Path, own_wheel: Path, echoquad: Callable[..., Any], tmp_path: Path
) -> None:
    config = tmp_path / "service.toml"
    config.write_text("[http]\nport = 9000\n")
    command = ["pack", tiny_bundle, "--out", tmp_path / "stick", "--target", "x86_64", "--wheel", own_wheel]
    ran = echoquad(*command, "--config", config, "--key", tmp_path / "absent.pem", code=1)
    note = 'the service will not check the signature; add public_key = "bundle.pub" to [model]'
    assert ran.err.splitlines()[0] == f"{config.as_posix()}: {note}"


def _offline(own_wheel: Path) -> dict[str, str]:
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(own_wheel.parent)}


def test_each_error_is_one_line_with_its_code(
    tiny_bundle: Path, own_wheel: Path, many: Callable[..., Any], tmp_path: Path
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    config = tmp_path / "service.toml"
    config.write_text("[http]\nprot = 1\n")
    out = tmp_path / "stick"
    stick = ["pack", tiny_bundle, "--out", out, "--target", "x86_64", "--wheel", own_wheel]
    expected = {
        "E_CONFIG extra 'nosuch'": [*stick, "--extras", "nosuch"],
        "E_CONFIG Python '4'": [*stick, "--python", "4"],
        "E_CONFIG http.prot: unknown key": [*stick, "--config", config],
        f"E_CONFIG {tmp_path / 'absent.pem'}: the key cannot be read": [*stick, "--key", tmp_path / "absent.pem"],
        f"E_CONFIG {own_wheel.as_posix()}: it is not a private key": [*stick, "--key", own_wheel],
        f"E_OUTPUT {full} has 1 entries": [*stick[:2], "--out", full, *stick[4:]],
        f"E_BUNDLE_NOT_FOUND {full.as_posix()}: no bundle here": ["pack", full, *stick[2:]],
        f"E_WHEELHOUSE {config.as_posix()}: not the file name of a wheel": [*stick, "--wheel", config],
        "E_WHEELHOUSE absent: no wheel for Python 3.12 on x86_64": [*stick, "--python", "3.12"],
        "E_STICK": ["pack", "--check", full],
        "E_USAGE --out is missing": ["pack", tiny_bundle, "--target", "x86_64"],
        "E_USAGE --target is missing": ["pack", tiny_bundle, "--out", out],
        "E_USAGE BUNDLE is missing": ["pack"],
        "E_USAGE Invalid value for '--target'": ["pack", tiny_bundle, "--out", out, "--target", "armv7l"],
        "E_USAGE --check with BUNDLE or --out": ["pack", tiny_bundle, "--check", full],
        "E_USAGE --public-key without --check": [*stick, "--public-key", config],
    }
    results, _ = many(list(expected.values()), env=_offline(own_wheel))
    for text, ran in zip(expected, results, strict=True):
        code, message = ran.error
        assert f"{code} {message}".startswith(text), (text, ran)
        assert ran.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "service.toml"]


def test_help_and_check_import_nothing_heavy(many: Callable[..., Any], tmp_path: Path) -> None:
    _, modules = many([["pack", "--help"], ["pack", "--check", tmp_path]])
    assert modules & {"onnxruntime", "torch", "packaging", "cryptography", "pip"} == set()
