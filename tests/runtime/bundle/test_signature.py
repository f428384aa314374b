"""Signing and signature verification, compared with the package ``model-signing``."""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import pytest

from echoquad_runtime.bundle import bundle as bundles
from echoquad_runtime.bundle import manifest as manifests
from echoquad_runtime.bundle import signature
from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.bundle.manifest import GOLDEN, MANIFEST, MODEL_CARD, SIGNATURE, encode_manifest, model_file
from echoquad_runtime.bundle.signing import check_private_key, sign_bundle
from echoquad_runtime.engine import onnx_engine as session
from echoquad_runtime.engine.onnx_engine import OnnxEngine
from echoquad_runtime.errors import (
    BundleError,
    BundleTamperedError,
    ConfigError,
    MissingExtraError,
    OutputError,
    SignatureError,
)
from echoquad_runtime.predict.predictor import Predictor
from echoquad_runtime.verify.verify import verify

if util.find_spec("model_signing") is None:  # if installed, it must be importable
    pytest.skip("the extra sign is not installed", allow_module_level=True)
model_signing = importlib.import_module("model_signing")
ec = importlib.import_module("cryptography.hazmat.primitives.asymmetric.ec")
ed25519 = importlib.import_module("cryptography.hazmat.primitives.asymmetric.ed25519")
hashes = importlib.import_module("cryptography.hazmat.primitives.hashes")
rsa = importlib.import_module("cryptography.hazmat.primitives.asymmetric.rsa")
serialization = importlib.import_module("cryptography.hazmat.primitives.serialization")

Make = Callable[..., Path]
PEM = serialization.Encoding.PEM
PKCS8 = serialization.PrivateFormat.PKCS8
OPENSSL = serialization.PrivateFormat.TraditionalOpenSSL
PLAIN = serialization.NoEncryption()
posix_only = pytest.mark.skipif(os.name != "posix", reason="Windows has none of it")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with NAME.pem and NAME.pub.pem for ours, theirs, p384, p521, and for unusable keys."""
    folder = tmp_path_factory.mktemp("keys")
    made = {
        "ours": ec.generate_private_key(ec.SECP256R1()),
        "theirs": ec.generate_private_key(ec.SECP256R1()),
        "p384": ec.generate_private_key(ec.SECP384R1()),
        "p521": ec.generate_private_key(ec.SECP521R1()),
        "k1": ec.generate_private_key(ec.SECP256K1()),
        "edwards": ed25519.Ed25519PrivateKey.generate(),
        "rsa": rsa.generate_private_key(65537, 2048),
    }
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    for name, key in made.items():
        (folder / f"{name}.pem").write_bytes(key.private_bytes(PEM, PKCS8, PLAIN))
        (folder / f"{name}.pub.pem").write_bytes(key.public_key().public_bytes(PEM, spki))
    locked = serialization.BestAvailableEncryption(b"password")
    (folder / "locked.pem").write_bytes(made["ours"].private_bytes(PEM, PKCS8, locked))
    (folder / "locked-openssl.pem").write_bytes(made["ours"].private_bytes(PEM, OPENSSL, locked))
    (folder / "openssl.pem").write_bytes(made["ours"].private_bytes(PEM, OPENSSL, PLAIN))
    (folder / "der.pem").write_bytes(made["ours"].public_key().public_bytes(serialization.Encoding.DER, spki))
    (folder / "text.pem").write_text("-----BEGIN PUBLIC KEY-----\nnot base64\n-----END PUBLIC KEY-----\n")
    (folder / "empty.pem").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def signed_once(keys: Path, tmp_path_factory: pytest.TempPathFactory, make_tiny_bundle: Make) -> Path:
    folder = make_tiny_bundle(tmp_path_factory.mktemp("signed") / "bundle", precisions=("fp32", "int8"))
    sign_bundle(folder, keys / "ours.pem")
    return folder


@pytest.fixture
def signed(signed_once: Path, tmp_path: Path) -> Path:
    """Return a signed bundle that a test may change."""
    return Path(shutil.copytree(signed_once, tmp_path / "bundle"))


@pytest.fixture
def ours(keys: Path) -> Path:
    return keys / "ours.pub.pem"


def refused(folder: Path, public_key: Path) -> str:
    with pytest.raises(SignatureError) as caught:
        Bundle(folder, public_key=public_key)
    assert isinstance(caught.value, BundleTamperedError)
    assert caught.value.exit_code == 3
    text = str(caught.value)
    assert text.startswith(f"{folder.as_posix()}: ")
    assert "\n" not in text
    assert len(text) < 700
    return text


def library_accepts(folder: Path, public_key: Path) -> bool:
    """Return the verdict of ``model-signing``."""
    verifier = model_signing.verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    try:
        verifier.verify(folder, folder / SIGNATURE)
    except Exception:  # ValueError, InvalidSignature, KeyError: no common base class
        return False
    return True


# ---------------------------------------------------------------------------------------------- accepted bundles


def test_signed_bundle_is_accepted(signed: Path, ours: Path, make_frame: Any) -> None:
    bundle = Bundle(signed, public_key=ours)
    assert bundle.signed_by == hashlib.sha256(ours.read_bytes()).hexdigest()
    assert SIGNATURE not in bundle.manifest["files"]
    assert verify(signed, device="cpu", public_key=ours).passed
    predictor = Predictor(str(signed), device="cpu", public_key=str(ours))
    assert predictor(make_frame(0)) == Predictor(signed, device="cpu")(make_frame(0))
    assert Bundle(signed).signed_by is None  # no verification was requested


@pytest.mark.parametrize("name", ["openssl", "p384", "p521"])
def test_other_key_formats_and_curves(name: str, keys: Path, tmp_path: Path, make_tiny_bundle: Make) -> None:
    folder, public_key = make_tiny_bundle(tmp_path / "b"), keys / f"{name.replace('openssl', 'ours')}.pub.pem"
    check_private_key(keys / f"{name}.pem")
    fingerprint = sign_bundle(folder, keys / f"{name}.pem")
    assert Bundle(folder, public_key=public_key).signed_by == fingerprint
    assert library_accepts(folder, public_key)


def test_signed_bundle_may_be_moved(signed: Path, ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = signed.rename(tmp_path / "Bündel of the cart")
    Bundle(moved, public_key=ours)
    monkeypatch.chdir(moved)
    Bundle(".", public_key=ours)


def test_signature_covers_every_file(signed: Path) -> None:
    payload = json.loads(base64.b64decode(json.loads((signed / SIGNATURE).read_bytes())["dsseEnvelope"]["payload"]))
    found = {resource["name"]: resource["digest"] for resource in payload["predicate"]["resources"]}
    names = [MANIFEST, GOLDEN, MODEL_CARD, model_file("fp32"), model_file("int8")]
    assert found == {name: hashlib.sha256((signed / name).read_bytes()).hexdigest() for name in names}
    assert payload["subject"][0]["name"] == "bundle"
    assert str(signed.parent) not in json.dumps(payload)


def test_signature_with_default_settings_of_model_signing_is_accepted(
    keys: Path, ours: Path, tmp_path: Path, make_tiny_bundle: Make
) -> None:
    folder = make_tiny_bundle(tmp_path / "bundle")
    signer = model_signing.signing.Config().use_elliptic_key_signer(private_key=keys / "ours.pem")
    signer.sign(folder, folder / SIGNATURE)
    Bundle(folder, public_key=ours)


def test_signing_again_replaces_the_signature(signed: Path, keys: Path, ours: Path) -> None:
    before = sorted(path.name for path in signed.iterdir())
    sign_bundle(signed, keys / "theirs.pem")
    assert sorted(path.name for path in signed.iterdir()) == before
    Bundle(signed, public_key=keys / "theirs.pub.pem")
    assert "signed by another key" in refused(signed, ours)


# ---------------------------------------------------------------------------------------------- refused bundles


def test_unsigned_bundle_is_refused(signed: Path, ours: Path) -> None:
    (signed / SIGNATURE).unlink()
    assert f"it is not signed ({SIGNATURE} is missing)" in refused(signed, ours)
    Bundle(signed)


def test_signature_by_another_key_is_refused(signed: Path, keys: Path, ours: Path) -> None:
    text = refused(signed, keys / "theirs.pub.pem")
    fingerprints = [hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in (ours, keys / "theirs.pub.pem")]
    assert f"it was signed by another key ('{fingerprints[0]}') than that of " in text
    assert f"('{fingerprints[1]}')" in text


ALTERED = (MANIFEST, GOLDEN, MODEL_CARD, model_file("fp32"), model_file("int8"))


@pytest.mark.parametrize("name", ALTERED)
def test_altered_file_is_refused(name: str, signed: Path, ours: Path) -> None:
    data = bytearray((signed / name).read_bytes())
    data[len(data) // 2] ^= 1
    (signed / name).write_bytes(data)
    assert f"'{name}' was altered after the bundle was signed (SHA-256 " in refused(signed, ours)
    assert not library_accepts(signed, ours)


@posix_only
def test_huge_file_is_refused_without_hashing(signed: Path, ours: Path) -> None:
    os.truncate(signed / GOLDEN, 1 << 36)  # a sparse file
    assert "'golden.npz' was altered after the bundle was signed (SHA-256 of too many bytes, " in refused(signed, ours)


@pytest.mark.parametrize("name", ALTERED[1:])
def test_removed_file_is_refused(name: str, signed: Path, ours: Path) -> None:
    (signed / name).unlink()
    assert f"'{name}' was removed after the bundle was signed" in refused(signed, ours)
    assert not library_accepts(signed, ours)


@pytest.mark.parametrize("name", ["notes.txt", ".hidden", ".gitignore", ".git", "model.fp16.onnx", "folder", "a\nb"])
def test_added_file_is_refused(name: str, signed: Path, ours: Path) -> None:
    if os.name == "nt" and "\n" in name:
        pytest.skip("no such name there")
    if name in ("folder", ".git"):
        (signed / name).mkdir()
    else:
        (signed / name).write_text("x")
    assert f"{name!r} was added after the bundle was signed" in refused(signed, ours)
    Bundle(signed)  # without a key, unlisted files are ignored


@pytest.mark.parametrize("consistent", [False, True])
def test_forged_bundle_with_correct_hashes_is_refused(consistent: bool, signed: Path, ours: Path) -> None:
    manifest = json.loads((signed / MANIFEST).read_bytes())
    manifest["training"] = {"backbone": "better"}
    if consistent:
        graph = (signed / model_file("fp32")).read_bytes() + b"\x12\x00"  # an empty producer name changes nothing
        (signed / model_file("fp32")).write_bytes(graph)
        entry = {"sha256": hashlib.sha256(graph).hexdigest(), "bytes": len(graph)}
        manifest["files"][model_file("fp32")] = entry
    (signed / MANIFEST).write_bytes(encode_manifest(manifest))
    assert verify(signed, device="cpu").passed  # hashes alone do not detect a forgery
    assert "'bundle.json' was altered after the bundle was signed" in refused(signed, ours)


@pytest.mark.parametrize("what", ["json", "model", "session"])
def test_content_is_not_used_before_verification(
    what: str, signed: Path, ours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def used(*_: object, **__: object) -> None:
        raise AssertionError(f"{what} was used")

    if what == "json":
        monkeypatch.setattr(bundles, "decode_manifest", used)
    elif what == "model":
        monkeypatch.setattr(Bundle, "read", used)
    else:
        monkeypatch.setattr(session, "open_session", used)
    (signed / MODEL_CARD).write_text("Cleared for diagnosis.\n")
    with pytest.raises(SignatureError, match=r"'MODEL_CARD.md' was altered"):
        Predictor(signed, device="cpu", public_key=ours)
    with pytest.raises(SignatureError, match=r"'MODEL_CARD.md' was altered"):
        verify(signed, device="cpu", public_key=ours)


# -------------------------------------------------------------------------------- files swapped during verification


def test_verified_manifest_is_the_one_that_is_used(signed: Path, ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a forged manifest on the disk while it is read, and restore the true one before verification."""
    true = (signed / MANIFEST).read_bytes()
    forged = encode_manifest({**json.loads(true), "training": {"backbone": "better"}})
    read, reads = manifests.read_regular, []

    def swap(path: Path, limit: int) -> bytes:
        data = read(path, limit)
        if path.name == MANIFEST:
            reads.append(path)
            path.write_bytes(true)
        return data

    monkeypatch.setattr(manifests, "read_regular", swap)
    (signed / MANIFEST).write_bytes(forged)
    assert "'bundle.json' was altered after the bundle was signed" in refused(signed, ours)
    assert (signed / MANIFEST).read_bytes() == true
    assert Bundle(signed, public_key=ours).manifest["training"] == json.loads(true)["training"]
    assert len(reads) == 2  # once per bundle


def test_graph_swapped_after_verification_is_refused(
    signed: Path, ours: Path, keys: Path, make_tiny_bundle: Make, tmp_path: Path
) -> None:
    bundle = Bundle(signed, public_key=ours)
    forged = make_tiny_bundle(tmp_path / "forged", precisions=("fp32", "int8"), graph={"logit_scale": -1.0})
    sign_bundle(forged, keys / "theirs.pem")
    for name in (*ALTERED, SIGNATURE):
        shutil.copy(forged / name, signed / name)
    with pytest.raises(BundleTamperedError, match=r"model\.fp32\.onnx has"):
        OnnxEngine(bundle, device="cpu")
    for name in ALTERED[1:]:
        if (forged / name).read_bytes() != (tmp_path / "bundle" / name).read_bytes():
            with pytest.raises(BundleTamperedError):
                bundle.read(name)


def test_signature_is_read_once(signed: Path, ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, names = signature.read_regular, []

    def swap(path: Path, limit: int) -> bytes:
        data = read(path, limit)
        names.append(path.name)
        path.write_bytes(b"swapped") if path.name == SIGNATURE else None
        return data

    monkeypatch.setattr(signature, "read_regular", swap)
    Bundle(signed, public_key=ours)
    assert names == [ours.name, SIGNATURE]


# ---------------------------------------------------------------------------------------------- the signature's bytes


def verified_parts(data: bytes) -> object:
    """Return the parts of a signature that are verified; the rest is arbitrary."""
    try:
        content = json.loads(data)
        envelope = content["dsseEnvelope"]
        parts = (envelope["payload"], envelope["payloadType"], [entry["sig"] for entry in envelope["signatures"]])
        return (content["mediaType"], content["verificationMaterial"]["publicKey"]["hint"], *parts)
    except Exception:
        return None


def test_signature_with_changed_bytes(signed: Path, ours: Path) -> None:
    data, rng, accepted = (signed / SIGNATURE).read_bytes(), random.Random(0), 0
    for position in range(0, len(data), 9):
        wrong = bytearray(data)
        wrong[position] ^= 1 << rng.randrange(8)
        (signed / SIGNATURE).write_bytes(wrong)
        if verified_parts(bytes(wrong)) == verified_parts(data):  # in an unverified part
            Bundle(signed, public_key=ours)
            accepted += 1
        else:
            refused(signed, ours)
    assert accepted < 10


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"[]", b"null", b"7", b'"x"', b"\xff\xfe", b"[" * 100_000, b"x" * (1 << 21), b"{" * 10, bytes(100)],
    ids=["empty", "{}", "[]", "null", "7", "str", "utf", "deep", "large", "open", "zeros"],
)
def test_invalid_signature_file_is_refused(data: bytes, signed: Path, ours: Path) -> None:
    (signed / SIGNATURE).write_bytes(data)
    assert "model.sig is not a signature by a key" in refused(signed, ours)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / SIGNATURE).read_bytes())
    change(content)
    (folder / SIGNATURE).write_text(json.dumps(content))


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("dsseEnvelope"),
        lambda content: content.update(dsseEnvelope=[]),
        lambda content: content["dsseEnvelope"].update(payloadType="text/plain"),
        lambda content: content.update(mediaType="application/vnd.dev.sigstore.bundle.v0.1+json"),
        lambda content: content["dsseEnvelope"].update(signatures=[]),
        lambda content: content["dsseEnvelope"].update(signatures=2 * content["dsseEnvelope"]["signatures"]),
        lambda content: content["dsseEnvelope"].update(signatures=[{"sig": 7}]),
        lambda content: content["dsseEnvelope"].update(payload="*" + content["dsseEnvelope"]["payload"]),
        lambda content: content["dsseEnvelope"].update(payload="é"),
        lambda content: content.update(verificationMaterial={"certificate": {"rawBytes": ""}}),
        lambda content: content["verificationMaterial"]["publicKey"].update(hint=None),
        lambda content: content["verificationMaterial"]["publicKey"].update(hint=["x"]),
    ],
)
def test_unexpected_envelope_is_refused(change: Callable[[dict[str, Any]], object], signed: Path, ours: Path) -> None:
    rewrite(signed, change)
    assert "model.sig is not a signature by a key" in refused(signed, ours)


def test_forged_key_fingerprint_is_refused(signed: Path, keys: Path, ours: Path) -> None:
    hint = json.loads((signed / SIGNATURE).read_bytes())["verificationMaterial"]["publicKey"]["hint"]
    sign_bundle(signed, keys / "theirs.pem")
    rewrite(signed, lambda content: content["verificationMaterial"]["publicKey"].update(hint=hint))
    assert "model.sig was not created by the key of " in refused(signed, ours)


def sign_payload(folder: Path, keys: Path, payload: object) -> None:
    """Sign any payload with our key, as its holder might for another purpose."""
    key = serialization.load_pem_private_key((keys / "ours.pem").read_bytes(), None)
    data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    message = b"DSSEv1 28 application/vnd.in-toto+json %d %b" % (len(data), data)
    signature = key.sign(message, ec.ECDSA(hashes.SHA256()))
    entry = {"payload": base64.b64encode(data).decode(), "signatures": [{"sig": base64.b64encode(signature).decode()}]}
    rewrite(folder, lambda content: content["dsseEnvelope"].update(entry))


def statement(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / SIGNATURE).read_bytes())
    return dict(json.loads(base64.b64decode(content["dsseEnvelope"]["payload"])))


def test_manually_signed_payload_is_accepted(signed: Path, keys: Path, ours: Path) -> None:
    sign_payload(signed, keys, statement(signed))
    Bundle(signed, public_key=ours)
    assert library_accepts(signed, ours)


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found.update(_type="https://in-toto.io/Statement/v0.1"),
        lambda found: found.update(predicateType="https://slsa.dev/provenance/v1"),
        lambda found: found.pop("predicate"),
        lambda found: found["predicate"].update(resources=None),
        lambda found: found["predicate"].update(resources=[7]),
        lambda found: found["predicate"]["serialization"].update(method="shards"),
        lambda found: found["predicate"]["resources"][0].update(algorithm="blake3"),
        lambda found: found["predicate"]["resources"][0].update(digest=7),
        lambda found: found["predicate"]["resources"][0].update(name=["x"]),
        lambda found: found["predicate"]["resources"].append(found["predicate"]["resources"][0]),
    ],
)
def test_unexpected_statement_by_the_right_key_is_refused(
    change: Callable[[dict[str, Any]], object], signed: Path, keys: Path
) -> None:
    found = statement(signed)
    change(found)
    sign_payload(signed, keys, found)
    text = refused(signed, keys / "ours.pub.pem")
    assert "model.sig is by the right key, but does not contain the SHA-256 of each file" in text


@pytest.mark.parametrize("payload", [b"", b"\xff", b"[]", b"7", b"[" * 100_000])
def test_payload_without_statement_is_refused(payload: bytes, signed: Path, keys: Path) -> None:
    sign_payload(signed, keys, payload)
    assert "is by the right key, but does not contain" in refused(signed, keys / "ours.pub.pem")


def test_statement_about_some_files_only_is_refused(signed: Path, keys: Path, ours: Path) -> None:
    found = statement(signed)
    resources = found["predicate"]["resources"]
    found["predicate"]["resources"] = [entry for entry in resources if entry["name"] != MANIFEST]
    sign_payload(signed, keys, found)
    assert "'bundle.json' was added after the bundle was signed" in refused(signed, ours)


# ---------------------------------------------------------------------------------------------- pipes and folders


@posix_only
@pytest.mark.parametrize("name", [SIGNATURE, MANIFEST, model_file("fp32"), model_file("int8")])
def test_pipe_in_place_of_a_file_does_not_block(name: str, signed: Path, ours: Path) -> None:
    (signed / name).unlink()
    os.mkfifo(signed / name)
    with pytest.raises(BundleError, match=rf"{name}'? cannot be read \(it is no regular file\)"):
        Bundle(signed, public_key=ours)


@pytest.mark.parametrize("name", [SIGNATURE, model_file("int8")])
def test_folder_in_place_of_a_file_is_refused(name: str, signed: Path, ours: Path) -> None:
    (signed / name).unlink()
    (signed / name).mkdir()
    assert f"{name}" in refused(signed, ours)
    assert "cannot be read (" in refused(signed, ours)


# ---------------------------------------------------------------------------------------------- unusable keys


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none.pem", "the key cannot be read (No such file or directory); check the path"),
        ("ours.pem", "found a private key; expected a public key"),
        ("locked.pem", "found a private key"),
        ("rsa.pub.pem", "found RSAPublicKey; expected an elliptic-curve key (prime256v1, secp384r1 or secp521r1)"),
        ("edwards.pub.pem", "found Ed25519PublicKey; expected an elliptic-curve key"),
        ("k1.pub.pem", "found the curve secp256k1; expected an elliptic-curve key"),
        ("der.pem", "it is not a public key in PEM form; expected an elliptic-curve key"),
        ("text.pem", "it is not a public key in PEM form"),
        ("empty.pem", "it is not a public key in PEM form"),
        (".", "the key cannot be read ("),
    ],
)
def test_unusable_public_key_is_refused(name: str, words: str, signed: Path, keys: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        Bundle(signed, public_key=keys / name)
    assert str(caught.value).startswith((keys / name).as_posix() + ": ")
    assert words in str(caught.value) or os.name == "nt"
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none.pem", "the key cannot be read (No such file or directory); check the path"),
        ("ours.pub.pem", "it is not a private key in PEM form; expected an elliptic-curve key"),
        (
            "locked.pem",
            "the private key is encrypted",
        ),
        ("locked-openssl.pem", "the private key is encrypted"),
        ("rsa.pem", "found RSAPrivateKey; expected an elliptic-curve key"),
        ("edwards.pem", "found Ed25519PrivateKey; expected an elliptic-curve key"),
        ("k1.pem", "found the curve secp256k1"),
        ("text.pem", "it is not a private key in PEM form"),
        ("empty.pem", "it is not a private key in PEM form"),
    ],
)
def test_unusable_private_key_is_refused(name: str, words: str, signed: Path, keys: Path) -> None:
    before = (signed / SIGNATURE).read_bytes()
    for refuse in (check_private_key, lambda path: sign_bundle(signed, path)):
        with pytest.raises(ConfigError) as caught:
            refuse(keys / name)
        assert words in str(caught.value) or os.name == "nt"
        assert "\n" not in str(caught.value)
    assert (signed / SIGNATURE).read_bytes() == before


def test_public_key_for_an_open_bundle_is_refused(signed: Path, ours: Path) -> None:
    bundle = Bundle(signed, public_key=ours)
    for model in (bundle, OnnxEngine(bundle, device="cpu")):
        with pytest.raises(ConfigError, match="public_key needs a bundle's folder"):
            Predictor(model, device="cpu", public_key=ours)


# -------------------------------------------------------------------------------- bundles that are not signed


def test_damaged_or_incomplete_bundle_is_not_signed(keys: Path, tmp_path: Path, make_tiny_bundle: Make) -> None:
    folder = make_tiny_bundle(tmp_path / "bundle")
    card = (folder / MODEL_CARD).read_bytes()
    (folder / MODEL_CARD).write_bytes(card.replace(b"tiny", b"vast"))
    with pytest.raises(BundleTamperedError, match=r"MODEL_CARD\.md has SHA-256"):
        sign_bundle(folder, keys / "ours.pem")
    (folder / MODEL_CARD).write_bytes(card)
    (folder / ".DS_Store").write_bytes(b"x")
    with pytest.raises(BundleError, match=r"it holds '\.DS_Store', which bundle\.json does not list"):
        sign_bundle(folder, keys / "ours.pem")
    assert not (folder / SIGNATURE).exists()
    with pytest.raises(BundleError, match="no bundle here"):
        sign_bundle(tmp_path, keys / "ours.pem")


@posix_only
def test_symlink_is_not_signed(keys: Path, tmp_path: Path, make_tiny_bundle: Make) -> None:
    folder = make_tiny_bundle(tmp_path / "bundle")
    (folder / GOLDEN).rename(tmp_path / GOLDEN)
    (folder / GOLDEN).symlink_to(tmp_path / GOLDEN)
    with pytest.raises(BundleError, match=r"model-signing rejects it \(.*symlink.*; copy the whole bundle"):
        sign_bundle(folder, keys / "ours.pem")
    assert not (folder / SIGNATURE).exists()
    linked = tmp_path / "linked"
    (folder / GOLDEN).unlink()
    (tmp_path / GOLDEN).rename(folder / GOLDEN)
    linked.symlink_to(folder)
    sign_bundle(linked, keys / "ours.pem")
    Bundle(linked, public_key=keys / "ours.pub.pem")


@pytest.mark.parametrize("name", [MANIFEST, GOLDEN])
def test_bundle_that_changes_during_signing_is_refused(
    name: str, keys: Path, tmp_path: Path, make_tiny_bundle: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny_bundle(tmp_path / "bundle")
    sign = model_signing.signing.Config.sign

    def late(self: Any, model: Path, signature: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes() + b"\n")
        sign(self, model, signature)

    monkeypatch.setattr(model_signing.signing.Config, "sign", late)
    with pytest.raises(BundleError, match="changed while"):
        sign_bundle(folder, keys / "ours.pem")
    assert not (folder / SIGNATURE).exists()


def test_full_disk_raises_output_error(
    keys: Path, tmp_path: Path, make_tiny_bundle: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny_bundle(tmp_path / "bundle")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"model\.sig: cannot be written \(No space left on device\)"):
        sign_bundle(folder, keys / "ours.pem")
    assert {path.name for path in folder.iterdir()} == {MANIFEST, GOLDEN, MODEL_CARD, model_file("fp32")}


# ---------------------------------------------------------------------------------------------- dependencies


@pytest.mark.parametrize("package", ["cryptography", "model_signing", "OpenSSL"])
def test_missing_extra_is_reported(
    package: str, signed: Path, keys: Path, ours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in (package, "model_signing")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    words = rf'signatures need {package}, which cannot be imported \(.*\); do: pip install "echoquad\[sign\]"'
    with pytest.raises(MissingExtraError, match=words):
        sign_bundle(signed, keys / "ours.pem")
    with pytest.raises(MissingExtraError, match=words):
        check_private_key(keys / "ours.pem")
    if package == "cryptography":
        with pytest.raises(MissingExtraError, match=words):
            Bundle(signed, public_key=ours)
    else:
        Bundle(signed, public_key=ours)  # verification does not need it
    Bundle(signed)


OFFLINE = """
import socket, sys
def connect(*_, **__): raise SystemExit("the network was used")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = connect
from pathlib import Path
from echoquad_runtime.bundle.bundle import Bundle
folder, private, public = map(Path, sys.argv[1:])
Bundle(folder, public_key=public)
used = {name.partition(".")[0] for name in sys.modules}
assert not used & {"model_signing", "sigstore", "requests", "urllib3", "onnxruntime"}, used
from echoquad_runtime.bundle.signing import sign_bundle
sign_bundle(folder, private)
Bundle(folder, public_key=public)
"""


def test_no_network_is_used_and_verification_needs_only_cryptography(signed: Path, keys: Path, ours: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", OFFLINE, signed, keys / "ours.pem", ours]
    ended = subprocess.run(command, check=False, capture_output=True, encoding="utf-8")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_predictor_without_public_key_imports_no_signature_code(signed: Path) -> None:
    code = "import sys; from echoquad import Predictor; Predictor(sys.argv[1], device='cpu'); print(*sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code, signed], check=True, capture_output=True, encoding="utf-8")
    imported = {name.partition(".")[0] for name in ended.stdout.split()}
    assert imported & {"cryptography", "model_signing", "OpenSSL"} == set()
    assert "echoquad_runtime.bundle.signature" not in ended.stdout.split()


# -------------------------------------------------------------------------------- comparison with model-signing


def spoil(folder: Path, rng: random.Random) -> None:
    """Change a random part of a signed bundle."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    path = rng.choice(files)
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    match rng.randrange(6):
        case 0:
            data[at] ^= 1 << rng.randrange(8)
        case 1:
            del data[at : at + rng.randrange(1, 40)]
        case 2:
            data[at:at] = rng.randbytes(rng.randrange(1, 9))
        case 3:
            path.unlink()
            return
        case 4:
            path = folder / rng.choice(["more.txt", "b", "zz.onnx"])
        case 5:
            other = rng.choice(files)
            data, kept = bytearray(other.read_bytes()), path.read_bytes()
            other.write_bytes(kept)
    path.write_bytes(data)


def test_verification_agrees_with_model_signing(signed_once: Path, ours: Path, tmp_path: Path) -> None:
    rng, outcomes = random.Random(5), {True: 0, False: 0}
    for index in range(60):
        folder = Path(shutil.copytree(signed_once, tmp_path / str(index)))
        spoil(folder, rng)
        try:
            Bundle(folder, public_key=ours)
            accepted = True
        except BundleError:
            accepted = False
        if accepted:
            assert library_accepts(folder, ours), index
        else:
            assert not library_accepts(folder, ours), index
        outcomes[accepted] += 1
    assert outcomes[False] > 50
