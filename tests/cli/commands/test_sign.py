"""``echoquad sign``, and ``--public-key`` of the commands that run a bundle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("model_signing")


def test_signed_bundle_is_used_with_its_public_key(
    bundle_copy: Path, frames_folder: Path, keys: Path, echoquad: Callable[..., Any], many: Callable[..., Any]
) -> None:
    ran = echoquad("sign", bundle_copy, "--key", keys / "ours.pem")
    assert ran.out.startswith(f"signed {bundle_copy.as_posix()} with key ")
    assert ran.out.endswith(f"; next: echoquad verify {bundle_copy.as_posix()} --public-key PEM\n")
    assert ran.err == ""
    key = ["--device", "cpu", "--public-key", keys / "ours.pub.pem"]
    (verified, predicted, without_key, benched), modules = many(
        [
            ["verify", bundle_copy, *key],
            ["predict", bundle_copy, frames_folder, *key],
            ["predict", bundle_copy, frames_folder, "--device", "cpu"],
            ["bench", bundle_copy, frames_folder, "--frames", "2", *key],
        ]
    )
    assert [ran.code for ran in (verified, predicted, without_key, benched)] == [0] * 4
    assert predicted.out == without_key.out
    assert modules & {"torch", "onnx", "model_signing", "sigstore", "requests"} == set()
    assert "cryptography" in modules


def test_bundle_not_signed_by_the_key_exits_3(
    bundle_copy: Path, frames_folder: Path, keys: Path, many: Callable[..., Any], tmp_path: Path
) -> None:
    out, record = tmp_path / "out.csv", tmp_path / "record.json"
    commands = [["verify", bundle_copy, "--json", record], ["predict", bundle_copy, frames_folder, "--out", out]]
    commands.append(["bench", bundle_copy, frames_folder, "--frames", "2"])
    ours, theirs = (["--device", "cpu", "--public-key", keys / f"{name}.pub.pem"] for name in ("ours", "theirs"))
    card = bundle_copy / "MODEL_CARD.md"
    sign = (
        "from echoquad_runtime.bundle.signing import sign_bundle; from pathlib import Path as P; "
        f"sign_bundle(P({str(bundle_copy)!r}), P({str(keys / 'ours.pem')!r}))"
    )
    found, modules = many(
        [
            *([*command, *ours] for command in commands),
            ["python", sign],
            *([*command, *theirs] for command in commands),
            ["python", f"P({str(card)!r}).write_text('Cleared for diagnosis.')"],
            *([*command, *ours] for command in commands),
        ]
    )
    assert "onnxruntime" not in modules  # a signature is checked before anything is loaded
    facts = ["model.sig", "another key", "MODEL_CARD.md"]
    for ran, expected in zip(found, [fact for fact in facts for _ in commands], strict=True):
        assert (ran.code, ran.out, len(ran.errors)) == (3, "", 1)
        assert ran.errors[0].startswith(f"{bundle_copy.as_posix()}: ") and expected in ran.errors[0]
    assert [ran.error[0] for ran in found] == ["E_VERIFICATION", "E_SIGNATURE", "E_SIGNATURE"] * 3
    assert not out.exists()
    assert json.loads(record.read_text("utf-8"))["signed_by"] is None


def test_unusable_keys_are_refused(
    bundle_copy: Path, frames_folder: Path, keys: Path, many: Callable[..., Any]
) -> None:
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
    facts = ["none.pem: ", "ours.pem: ", "ours.pub.pem: ", "notes.txt", "bundle.json", "Missing option '--key'"]
    for ran, expected, code in zip(found, facts, [1, 1, 1, 1, 1, 2], strict=True):
        assert (ran.code, ran.out, len(ran.err.splitlines())) == (code, "", 1)
        assert expected in ran.errors[0]
    assert "private key" in found[1].errors[0] and "private key" in found[2].errors[0]
    assert found[4].error[0] == "E_BUNDLE_NOT_FOUND" and found[5].error[0] == "E_USAGE"
    assert not (bundle_copy / "model.sig").exists()


WITHOUT = "sys.modules |= dict.fromkeys(['cryptography', 'model_signing', 'OpenSSL'])"


def test_missing_sign_extra_is_named(
    bundle_copy: Path, frames_folder: Path, keys: Path, echoquad: Callable[..., Any]
) -> None:
    for line in (
        ["predict", bundle_copy, frames_folder, "--public-key", keys / "ours.pub.pem"],
        ["sign", bundle_copy, "--key", keys / "ours.pem"],
    ):
        code, message = echoquad(*line, code=1, driver=WITHOUT).error
        assert code == "E_EXTRA_MISSING" and 'pip install "echoquad[sign]"' in message
    echoquad("predict", bundle_copy, frames_folder, driver=WITHOUT)
