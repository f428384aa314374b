"""``echoquad sign``, and ``--public-key`` of what runs a bundle."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import pytest

if util.find_spec("model_signing") is None:
    pytest.skip("the extra sign is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with the key pairs ours and theirs."""
    ec = importlib.import_module("cryptography.hazmat.primitives.asymmetric.ec")
    form = importlib.import_module("cryptography.hazmat.primitives.serialization")
    folder = tmp_path_factory.mktemp("keys")
    for name in ("ours", "theirs"):
        key = ec.generate_private_key(ec.SECP256R1())
        private = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
        public = key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
        (folder / f"{name}.pem").write_bytes(private)
        (folder / f"{name}.pub.pem").write_bytes(public)
    return folder


def test_sign_then_use(
    bundle_copy: Path, frames_folder: Path, keys: Path, echoquad: Callable[..., Any], many: Callable[..., Any]
) -> None:
    ran = echoquad("sign", bundle_copy, "--key", keys / "ours.pem")
    assert ran.out.startswith(f"signed {bundle_copy.as_posix()} with key ")
    assert ran.out.endswith(f"; next: echoquad verify {bundle_copy.as_posix()} --public-key PEM\n")
    assert ran.err == ""
    key = ["--device", "cpu", "--public-key", keys / "ours.pub.pem"]
    (verified, predicted, unasked, benched), modules = many(
        [
            ["verify", bundle_copy, *key],
            ["predict", bundle_copy, frames_folder, *key],
            ["predict", bundle_copy, frames_folder, "--device", "cpu"],
            ["bench", bundle_copy, frames_folder, "--frames", "2", *key],
        ]
    )
    assert [ran.code for ran in (verified, predicted, unasked, benched)] == [0] * 4
    assert predicted.out == unasked.out
    assert modules & {"torch", "onnx", "model_signing", "sigstore", "requests"} == set()
    assert "cryptography" in modules


def test_what_is_not_signed_by_that_key_is_not_used(
    bundle_copy: Path, frames_folder: Path, keys: Path, many: Callable[..., Any], tmp_path: Path
) -> None:
    out, record = tmp_path / "out.csv", tmp_path / "record.json"
    commands = [["verify", bundle_copy, "--json", record], ["predict", bundle_copy, frames_folder, "--out", out]]
    commands.append(["bench", bundle_copy, frames_folder, "--frames", "2"])
    ours, theirs = (["--device", "cpu", "--public-key", keys / f"{name}.pub.pem"] for name in ("ours", "theirs"))
    card = bundle_copy / "MODEL_CARD.md"
    # All of it in one process, which never gets as far as onnxruntime.
    found, modules = many(
        [
            *([*command, *ours] for command in commands),
            ["python", f"from echoquad_runtime.bundle.signing import sign_bundle; from pathlib import Path as P; "
             f"sign_bundle(P({str(bundle_copy)!r}), P({str(keys / 'ours.pem')!r}))"],
            *([*command, *theirs] for command in commands),
            ["python", f"P({str(card)!r}).write_text('Cleared for diagnosis.')"],
            *([*command, *ours] for command in commands),
        ]
    )  # fmt: skip
    assert "onnxruntime" not in modules
    words = ["it is not signed (model.sig is missing)", "it was signed by another key", "'MODEL_CARD.md' was altered"]
    for ran, expected in zip(found, [word for word in words for _ in commands], strict=True):
        assert (ran.code, ran.out, len(ran.errors)) == (3, "", 1)
        assert ran.errors[0].startswith(f"{bundle_copy.as_posix()}: {expected}")
    assert not out.exists()
    assert json.loads(record.read_text("utf-8"))["signed_by"] is None


def test_keys_of_no_use(bundle_copy: Path, frames_folder: Path, keys: Path, many: Callable[..., Any]) -> None:
    (bundle_copy / "notes.txt").write_text("x")
    found, _ = many(
        [
            ["predict", bundle_copy, frames_folder, "--public-key", keys / "none.pem"],
            ["verify", bundle_copy, "--public-key", keys / "ours.pem"],
            ["sign", bundle_copy, "--key", keys / "ours.pub.pem"],
            ["sign", bundle_copy, "--key", keys / "ours.pem"],
            ["sign", frames_folder, "--key", keys / "ours.pem"],
            ["sign", bundle_copy],
        ]
    )
    words = [
        "none.pem: the key cannot be read (",
        "ours.pem: found a private key; expected a public key",
        "ours.pub.pem: it is not a private key in PEM form",
        "it holds 'notes.txt', which bundle.json does not list",
        "no bundle here (bundle.json is missing)",
        "Missing option '--key'",
    ]
    for ran, expected, code in zip(found, words, [1, 1, 1, 1, 1, 2], strict=True):
        assert (ran.code, ran.out, len(ran.err.splitlines())) == (code, "", 1)
        assert expected in ran.errors[0]
    assert not (bundle_copy / "model.sig").exists()


WITHOUT = "sys.modules |= dict.fromkeys(['cryptography', 'model_signing', 'OpenSSL'])"


def test_without_the_extra(bundle_copy: Path, frames_folder: Path, keys: Path, echoquad: Callable[..., Any]) -> None:
    for line in (
        ["predict", bundle_copy, frames_folder, "--public-key", keys / "ours.pub.pem"],
        ["sign", bundle_copy, "--key", keys / "ours.pem"],
    ):
        ran = echoquad(*line, code=1, driver=WITHOUT)
        assert "cannot be imported" in ran.errors[0]
        assert 'do: pip install "echoquad[sign]"' in ran.errors[0]
    echoquad("predict", bundle_copy, frames_folder, driver=WITHOUT)
