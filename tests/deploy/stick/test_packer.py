"""Packing a stick: what it holds, and that it appears complete or not at all."""

from __future__ import annotations

import email
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import pytest

from echoquad_deploy.stick import packer
from echoquad_deploy.stick.packer import PackedStick, pack_stick
from echoquad_deploy.stick.target import Target
from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.errors import (
    BundleError,
    BundleNotFoundError,
    BundleTamperedError,
    ConfigError,
    HostError,
    MissingExtraError,
    OutputError,
    VerificationError,
)
from echoquad_serve.config import load_config

TARGET = Target("aarch64", "3.12")


def test_stick_has_exactly_these_files(packed: PackedStick, tiny_bundle: Path) -> None:
    files = {path.relative_to(packed.folder).as_posix() for path in packed.folder.rglob("*") if path.is_file()}
    wheels = {
        "cryptography-1.0-cp311-abi3-manylinux2014_aarch64.manylinux_2_17_aarch64.whl",
        "echoquad-0.9.0-py3-none-any.whl",
        "numpy-1.0-py3-none-any.whl",
        "onnxruntime-1.0-cp312-cp312-manylinux_2_28_aarch64.whl",
        "pip-1.0-py3-none-any.whl",
        "starlette-1.0-py3-none-any.whl",
    }
    licensed = ("cryptography-1.0", "echoquad-0.9.0", "numpy-1.0", "onnxruntime-1.0", "pip-1.0")
    assert files == {
        *("README.txt", "SHA256SUMS", "SHA256SUMS.sig", "install.ps1", "install.sh", "requirements.lock"),
        *("config/service.toml", "keys/bundle.pub", "sbom.cdx.json", "stick.json", "systemd/echoquad.service"),
        *(f"wheels/{name}" for name in wheels),
        *(f"bundle/{path.name}" for path in tiny_bundle.iterdir()),
        "bundle/model.sig",
        *(f"licences/{name}/LICENSE" for name in licensed),
        "licences/README.txt",
    }
    assert packed.wheels == len(wheels)
    assert packed.size == sum((packed.folder / name).stat().st_size for name in files)
    assert packed.without_licence == ("starlette",)
    assert os.name == "nt" or (packed.folder / "install.sh").stat().st_mode & 0o777 == 0o755
    assert [path.name for path in packed.folder.parent.iterdir()] == ["stick"]


def test_installer_and_unit_are_those_of_this_package(packed: PackedStick) -> None:
    package = Path(str(resources.files("echoquad_deploy")))
    for name, source in {
        "install.sh": "install/install.sh",
        "install.ps1": "install/install.ps1",
        "systemd/echoquad.service": "systemd/echoquad.service",
    }.items():
        assert (packed.folder / name).read_bytes() == (package / source).read_bytes()


def test_facts_name_release_target_and_bundle(packed: PackedStick, tiny_bundle: Path) -> None:
    facts = json.loads((packed.folder / "stick.json").read_text())
    assert facts.pop("created").endswith("+00:00")
    assert facts == {
        "format": 1,
        "echoquad": "0.9.0",
        "target": "aarch64",
        "python": "3.12",
        "glibc": "2.28",
        "extras": ["cpu", "serve"],
        "bundle": "bundle",
        "bundle_sha256": Bundle(tiny_bundle).manifest["manifest_sha256"],
    }


def test_bundle_on_the_stick_is_signed_and_the_original_is_not_changed(
    packed: PackedStick, tiny_bundle: Path, keys: Path
) -> None:
    assert Bundle(packed.folder / "bundle", public_key=keys / "ours.pub.pem").signed_by
    assert not (tiny_bundle / "model.sig").exists()


def test_default_configuration_is_valid_and_requires_the_signature(
    packed: PackedStick, offline: Path, tiny_bundle: Path, own_wheel: Path, tmp_path: Path
) -> None:
    config = load_config(packed.folder / "config" / "service.toml")
    assert config.model.public_key == packed.folder / "config" / "bundle.pub"  # beside it, as in /etc/echoquad
    assert config.store.folder == Path("/var/lib/echoquad/store")
    assert config.http.host == "127.0.0.1"
    unsigned = pack_stick(tiny_bundle, tmp_path / "stick", TARGET, wheel=own_wheel)
    assert load_config(unsigned.folder / "config" / "service.toml").model.public_key is None
    assert not (unsigned.folder / "keys").exists() and not (unsigned.folder / "SHA256SUMS.sig").exists()
    assert "cryptography" not in (unsigned.folder / "requirements.lock").read_text()
    assert unsigned.fingerprint is None
    assert "install.sh --unsigned" in (unsigned.folder / "README.txt").read_text()


def test_no_private_key_and_no_path_of_this_machine_is_on_the_stick(packed: PackedStick, keys: Path) -> None:
    secret = (keys / "ours.pem").read_bytes().splitlines()[1]
    for path in packed.folder.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert b"PRIVATE KEY" not in data and secret not in data, path
            assert os.fsencode(packed.folder.parent) not in data, path
            assert os.fsencode(keys) not in data, path


def test_bill_of_materials_has_the_hash_of_each_wheel(packed: PackedStick) -> None:
    text = (packed.folder / "sbom.cdx.json").read_text()
    sums = dict(line.split("  ")[::-1] for line in (packed.folder / "SHA256SUMS").read_text().splitlines())
    assert [name for name, digest in sums.items() if name.startswith("wheels/") and digest not in text] == []
    assert json.loads(text)["specVersion"] == "1.6"


def test_given_configuration_and_signature_of_the_bundle_stay_as_they_are(
    offline: Path, tiny_bundle: Path, own_wheel: Path, keys: Path, tmp_path: Path
) -> None:
    from echoquad_runtime.bundle.signing import sign_bundle

    bundle, config = Path(shutil.copytree(tiny_bundle, tmp_path / "signed")), tmp_path / "mine.toml"
    sign_bundle(bundle, keys / "theirs.pem")
    config.write_text("[http]\nport = 9999\n")
    packed = pack_stick(bundle, tmp_path / "stick", TARGET, wheel=own_wheel, config=config)
    assert (packed.folder / "config" / "service.toml").read_bytes() == config.read_bytes()
    assert Bundle(packed.folder / "bundle", public_key=keys / "theirs.pub.pem").signed_by
    assert not (packed.folder / "keys").exists()


def _damage(bundle: Path) -> None:
    with (bundle / "model.fp32.onnx").open("ab") as stream:
        stream.write(b"x")


def _remove_model(bundle: Path) -> None:
    (bundle / "model.fp32.onnx").unlink()


def _remove_manifest(bundle: Path) -> None:
    (bundle / "bundle.json").unlink()


@pytest.mark.parametrize(
    ("change", "error"),
    [(_damage, BundleTamperedError), (_remove_model, BundleError), (_remove_manifest, BundleNotFoundError)],
)
def test_damaged_bundle_leaves_no_stick(
    change: Callable[[Path], None],
    error: type[Exception],
    offline: Path,
    tiny_bundle: Path,
    own_wheel: Path,
    tmp_path: Path,
) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "in" / "bundle"))
    change(bundle)
    with pytest.raises(error):
        pack_stick(bundle, tmp_path / "out" / "stick", TARGET, wheel=own_wheel)
    assert list((tmp_path / "out").iterdir()) == []


def test_bundle_that_decides_otherwise_leaves_no_stick(
    offline: Path, make_tiny_bundle: Callable[..., Path], own_wheel: Path, tmp_path: Path
) -> None:
    bundle = make_tiny_bundle(tmp_path / "in", graph={"logit_scale": -1.0})
    with pytest.raises(VerificationError, match="golden frames have other decisions"):
        pack_stick(bundle, tmp_path / "out" / "stick", TARGET, wheel=own_wheel)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("extras", "message"),
    [
        (["serve", "nosuch"], "extra 'nosuch': EchoQuad 0.9.0 has none of this name; expected some of cpu, gpu, serve"),
        (["cpu", "gpu"], "extras cpu and gpu: they exclude each other"),
    ],
)
def test_extras_that_cannot_be_are_refused_before_a_download(
    extras: list[str], message: str, tiny_bundle: Path, own_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packer, "collect_wheels", lambda *_: pytest.fail("downloaded"))
    with pytest.raises(ConfigError, match=message):
        pack_stick(tiny_bundle, tmp_path / "stick", TARGET, wheel=own_wheel, extras=extras)


def test_python_that_is_too_old_is_refused_before_a_download(
    tiny_bundle: Path, own_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packer, "collect_wheels", lambda *_: pytest.fail("downloaded"))
    with pytest.raises(ConfigError, match=r"Python '3\.9': EchoQuad 0\.9\.0 needs >=3\.11"):
        pack_stick(tiny_bundle, tmp_path / "stick", Target("x86_64", "3.9"), wheel=own_wheel)
    assert list(tmp_path.iterdir()) == []


def test_existing_folder_is_not_replaced(tiny_bundle: Path, own_wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "stick").mkdir()
    (tmp_path / "stick" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="has 1 entries, expected a new or empty folder"):
        pack_stick(tiny_bundle, tmp_path / "stick", TARGET, wheel=own_wheel)
    assert [path.name for path in tmp_path.iterdir()] == ["stick"]
    assert (tmp_path / "stick" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("kind", ["missing", "public", "rsa", "encrypted"])
def test_key_that_cannot_sign_is_refused_first(
    kind: str, keys: Path, tiny_bundle: Path, own_wheel: Path, tmp_path: Path
) -> None:
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    path = tmp_path / "key.pem"
    pkcs8 = (form.Encoding.PEM, form.PrivateFormat.PKCS8)
    if kind == "public":
        path = keys / "ours.pub.pem"
    elif kind == "rsa":
        path.write_bytes(rsa.generate_private_key(65537, 2048).private_bytes(*pkcs8, form.NoEncryption()))
    elif kind == "encrypted":
        key = ec.generate_private_key(ec.SECP256R1())
        path.write_bytes(key.private_bytes(*pkcs8, form.BestAvailableEncryption(b"secret")))
    with pytest.raises(ConfigError):
        pack_stick(tiny_bundle, tmp_path / "stick", TARGET, wheel=own_wheel, key=path)
    assert not (tmp_path / "stick").exists()


def test_installation_without_its_scripts_is_one_line(
    tiny_bundle: Path, own_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packer.resources, "files", lambda package: tmp_path / "absent")
    with pytest.raises(HostError, match=r"install\.sh is not in this installation of EchoQuad"):
        pack_stick(tiny_bundle, tmp_path / "stick", TARGET, wheel=own_wheel)


def test_missing_tool_is_named(
    tiny_bundle: Path, own_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from echoquad_deploy.stick import wheelhouse

    monkeypatch.setattr(wheelhouse.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r'do: pip install "echoquad\[deploy\]"'):
        pack_stick(tiny_bundle, tmp_path / "stick", TARGET, wheel=own_wheel)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_packing_that_is_killed_leaves_no_stick_and_the_next_one_sweeps(
    offline: Path, tiny_bundle: Path, own_wheel: Path, tmp_path: Path
) -> None:
    out = tmp_path / "stick"
    code = f"""
import time
from pathlib import Path
from echoquad_deploy.stick import packer
from echoquad_deploy.stick.target import Target
packer.write_sums = lambda folder: (Path({str(tmp_path / "there")!r}).touch(), time.sleep(60))
packer.pack_stick(Path({str(tiny_bundle)!r}), Path({str(out)!r}), Target("aarch64", "3.12"),
                  wheel=Path({str(own_wheel)!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "there").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert process.poll() is None and (tmp_path / "there").exists()
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert not out.exists()
    pack_stick(tiny_bundle, out, TARGET, wheel=own_wheel)
    assert {path.name for path in tmp_path.iterdir()} == {"stick", "there"}


def test_metadata_of_the_lock_and_of_the_wheels_agree(packed: PackedStick) -> None:
    """Read names and versions from the wheels' metadata, and not from their file names as the packer does."""
    stated = set()
    for path in (packed.folder / "wheels").iterdir():
        with zipfile.ZipFile(path) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
            fields = email.message_from_bytes(archive.read(name))
        stated.add(f"{fields['Name'].lower()}=={fields['Version']}")
    lines = (packed.folder / "requirements.lock").read_text().splitlines()
    assert {line.partition(" ")[0] for line in lines} == stated
