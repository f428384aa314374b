"""Bundles: the manifest's bytes and fields, and the other files."""

from __future__ import annotations

import bisect
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.bundle.manifest import GOLDEN, MANIFEST, decode_manifest, encode_manifest, model_file
from echoquad_runtime.contract import Contract
from echoquad_runtime.errors import BundleError, BundleNotFoundError, BundleTamperedError

Make = Callable[..., Path]


@pytest.fixture
def bundle(tmp_path: Path, make_tiny_bundle: Make) -> Path:
    return make_tiny_bundle(tmp_path / "bundle")


def rewrite(folder: Path, **changes: Any) -> Path:
    """Change fields of the manifest and recompute its own hash, as a malicious or faulty writer would."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest |= changes
    kept = {key: value for key, value in manifest.items() if value is not ...}
    (folder / MANIFEST).write_bytes(encode_manifest(kept))
    return folder


def test_valid_bundle_opens(tiny_bundle: Path) -> None:
    bundle = Bundle(tiny_bundle)
    assert bundle.contract == Contract(classes=("ASD", "NORM"), input_size=32)
    assert (bundle.precisions, bundle.default_precision) == (("fp32",), "fp32")
    assert bundle.choose_precision(None) == bundle.choose_precision("fp32") == "fp32"
    assert bundle.read_model("fp32") == (tiny_bundle / "model.fp32.onnx").read_bytes()
    assert bundle.gate("fp32")["max_abs_dlogit"] == 1e-4
    golden = bundle.read_golden()
    assert len(golden.names) == len(golden.frames) == len(golden.logits) == len(golden.probabilities)
    assert Bundle(str(tiny_bundle)).manifest == bundle.manifest


# ---------------------------------------------------------------------------------------------- the manifest's bytes


def test_manifest_with_a_flipped_byte_is_refused(tmp_path: Path, make_tiny_bundle: Make) -> None:
    bundle = make_tiny_bundle(tmp_path, manifest={"parity": {}})  # short: it is decoded once per byte
    path = bundle / MANIFEST
    data = path.read_bytes()
    rng = random.Random(0)
    for position in range(len(data)):
        wrong = bytearray(data)
        wrong[position] ^= rng.choice([1, 2, 4, 8, 16, 32, 64, 128, 255])
        with pytest.raises(BundleError) as caught:
            decode_manifest(bytes(wrong), "bundle")
        assert "\n" not in str(caught.value)
        if position % 50 == 0:
            path.write_bytes(wrong)
            with pytest.raises(type(caught.value)):
                Bundle(bundle)
    path.write_bytes(data)
    assert Bundle(bundle).manifest == decode_manifest(data, "bundle")


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data + b"\n",
        lambda data: data[:-1],
        lambda data: b"\xef\xbb\xbf" + data,
        lambda data: data.replace(b"\n", b"\r\n"),
        lambda data: data.replace(b"{", b"{ ", 1),
        lambda data: data.replace(b'  "default_precision": "fp32",\n', b'  "default_precision": "fp32",\n' * 2),
        lambda data: json.dumps(json.loads(data)).encode(),
        lambda data: data.replace(b"0.9", b"0.90"),
        lambda data: data.replace(b"ASD", b"NORM").replace(b"NORM", b"ASD"),
    ],
    ids=["longer", "shorter", "BOM", "CRLF", "blank", "twice", "compact", "number", "classes"],
)
def test_manifest_in_another_encoding_is_refused(bundle: Path, change: Callable[[bytes], bytes]) -> None:
    data = (bundle / MANIFEST).read_bytes()
    assert change(data) != data
    (bundle / MANIFEST).write_bytes(change(data))
    with pytest.raises(BundleTamperedError, match=r"bundle\.json") as caught:
        Bundle(bundle)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", BundleTamperedError),
        ("not json", BundleTamperedError),
        ('{"schema": 1', BundleTamperedError),
        ("\xe9", BundleTamperedError),
        ("[" * 100_000, BundleTamperedError),
        ('{"schema": 1, "a": NaN}', BundleTamperedError),
        ('{"schema": 1, "a": 1e999}', BundleTamperedError),
        ('{"schema": 1}', BundleTamperedError),
        ("[]", BundleError),
        ("null", BundleError),
        ('"bundle"', BundleError),
        ("{}", BundleError),
    ],
    ids=["empty", "word", "cut", "latin", "deep", "nan", "inf", "no hash", "list", "null", "str", "object"],
)
def test_invalid_manifest_is_refused(tmp_path: Path, text: str, error: type[BundleError]) -> None:
    (tmp_path / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(error) as caught:
        Bundle(tmp_path)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)


def can_be_read(depth: int) -> bool:
    try:
        json.loads("[" * depth + "]" * depth)
    except RecursionError:
        return False
    return True


def test_deeply_nested_manifest_is_refused(tmp_path: Path) -> None:
    # Just below the depth that json.loads refuses, json.dumps fails on what json.loads has read.
    deepest = bisect.bisect_left(range(100_000), True, key=lambda depth: not can_be_read(depth))
    for depth in range(deepest - 15, deepest + 2):
        (tmp_path / MANIFEST).write_text('{"schema": 1, "a": ' + "[" * depth + "]" * depth + "}")
        with pytest.raises(BundleTamperedError):
            Bundle(tmp_path)


def test_folder_without_manifest_raises_not_found(tmp_path: Path) -> None:
    with pytest.raises(BundleNotFoundError, match=r"no bundle here \(bundle.json is missing\)") as caught:
        Bundle(tmp_path)
    assert isinstance(caught.value, FileNotFoundError)
    assert caught.value.exit_code == 1
    with pytest.raises(BundleNotFoundError):
        Bundle(tmp_path / "absent")
    (tmp_path / MANIFEST).mkdir()
    with pytest.raises(BundleNotFoundError, match="cannot be read"):
        Bundle(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(BundleNotFoundError):
        Bundle(tmp_path / "file")


# ---------------------------------------------------------------------------------------------- the manifest's fields


@pytest.mark.parametrize("schema", [0, 2, "1", None, True, [1]])
def test_unknown_schema_is_refused(bundle: Path, schema: object) -> None:
    with pytest.raises(BundleError, match=r"the bundle has schema .*; this EchoQuad reads 1") as caught:
        Bundle(rewrite(bundle, schema=schema))
    assert not isinstance(caught.value, BundleTamperedError)


@pytest.mark.parametrize(
    "name",
    ["contract", "contract_sha256", "files", "precisions", "default_precision", "parity", "training", "intended_use"],
)
@pytest.mark.parametrize("value", [..., None, 3], ids=["absent", "null", "number"])
def test_missing_manifest_field_is_refused(bundle: Path, name: str, value: object) -> None:
    with pytest.raises(BundleError, match=f"bundle\\.json has no valid `{name}`"):
        Bundle(rewrite(bundle, **{name: value}))


@pytest.mark.parametrize("name", ["../x", "a/b", "a\\b", "C:x", ".hidden", "..", ".", "", "a\0b", "/etc/passwd"])
def test_file_name_outside_the_folder_is_refused(bundle: Path, name: str) -> None:
    files = json.loads((bundle / MANIFEST).read_text())["files"]
    with pytest.raises(BundleError, match="expected a plain name with its SHA-256"):
        Bundle(rewrite(bundle, files={**files, name: {"sha256": "0" * 64}}))


@pytest.mark.parametrize("entry", [None, "hash", {}, {"sha256": 5}, []])
def test_file_without_a_hash_is_refused(bundle: Path, entry: object) -> None:
    files = json.loads((bundle / MANIFEST).read_text())["files"]
    with pytest.raises(BundleError, match="expected a plain name with its SHA-256"):
        Bundle(rewrite(bundle, files={**files, "x.txt": entry}))


def test_contract_with_another_hash_is_refused(bundle: Path) -> None:
    other = Contract(classes=("ASD", "NORM"), input_size=32, keep=0.8)
    with pytest.raises(BundleTamperedError, match="the contract does not match its SHA-256"):
        Bundle(rewrite(bundle, contract=other.to_dict()))


@pytest.mark.parametrize("change", [{"keep": 2}, {"classes": ["A"]}, {"extra": 1}, {"schema": 2}])
def test_invalid_contract_is_refused(bundle: Path, change: dict[str, object]) -> None:
    values = {**Contract(classes=("ASD", "NORM")).to_dict(), **change}
    with pytest.raises(BundleError, match="bundle: contract: "):
        Bundle(rewrite(bundle, contract=values))


def test_default_precision_without_graph_is_refused(bundle: Path) -> None:
    with pytest.raises(BundleError, match="its default precision is 'int8'; expected one of fp32"):
        Bundle(rewrite(bundle, default_precision="int8"))


def test_precision_without_file_is_refused(bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"model\.fp16\.onnx is not among its files"):
        Bundle(rewrite(bundle, precisions={"fp32": {}, "fp16": {}}))


def test_choose_precision_refuses_a_missing_graph(tiny_bundle: Path) -> None:
    with pytest.raises(BundleError, match="it holds no int8 graph, only fp32; "):
        Bundle(tiny_bundle).choose_precision("int8")


def test_first_precision_is_the_default(tmp_path: Path, make_tiny_bundle: Make) -> None:
    bundle = Bundle(make_tiny_bundle(tmp_path, precisions=("fp16", "fp32")))
    assert (set(bundle.precisions), bundle.default_precision) == ({"fp16", "fp32"}, "fp16")
    assert bundle.choose_precision("fp32") == "fp32"


@pytest.mark.parametrize(
    "parity",
    [
        {},
        {"fp16": {"gate": {"max_abs_dprobability": 1.0, "max_frame_flip_fraction": 0.0}}},
        {"fp32": None},
        {"fp32": []},
        {"fp32": {}},
        {"fp32": {"gate": {}}},
        {"fp32": {"gate": {"max_abs_dprobability": 1.0}}},
        {"fp32": {"gate": {"max_abs_dprobability": "1", "max_frame_flip_fraction": 0.0}}},
        {"fp32": {"gate": {"max_abs_dprobability": True, "max_frame_flip_fraction": 0.0}}},
    ],
)
def test_gate_refuses_a_manifest_without_one(bundle: Path, parity: dict[str, object]) -> None:
    opened = Bundle(rewrite(bundle, parity=parity))
    with pytest.raises(BundleError, match="it states no parity gate for fp32"):
        opened.gate("fp32")


# ---------------------------------------------------------------------------------------------- the other files


@pytest.mark.parametrize("name", [model_file("fp32"), GOLDEN, "MODEL_CARD.md"])
def test_file_with_a_flipped_byte_is_refused(bundle: Path, name: str) -> None:
    opened = Bundle(bundle)
    data = (bundle / name).read_bytes()
    rng = random.Random(0)
    for position in {0, len(data) - 1, *(rng.randrange(len(data)) for _ in range(40))}:
        wrong = bytearray(data)
        wrong[position] ^= 1 << rng.randrange(8)
        (bundle / name).write_bytes(wrong)
        with pytest.raises(BundleTamperedError, match=f"{name} has SHA-256 .* expected .*copy the whole") as caught:
            opened.read(name)
        assert caught.value.exit_code == 3
    for other in (b"", data + b"\0", data[:-1]):
        (bundle / name).write_bytes(other)
        with pytest.raises(BundleTamperedError):
            opened.read(name)


def test_missing_file_is_refused(bundle: Path) -> None:
    (bundle / GOLDEN).unlink()
    opened = Bundle(bundle)
    with pytest.raises(BundleError, match=r"golden.npz cannot be read \(.+\); copy the whole bundle again"):
        opened.read_golden()


def test_unlisted_file_is_refused(bundle: Path) -> None:
    (bundle / "other.txt").write_text("x")
    for name in ("other.txt", MANIFEST, "../bundle/golden.npz"):
        with pytest.raises(BundleError, match=r"is not listed in bundle\.json"):
            Bundle(bundle).read(name)


@pytest.mark.parametrize("size", [0, 1, 41, 43, 1 << 39])
def test_file_of_another_size_is_refused(bundle: Path, size: int) -> None:
    (bundle / "MODEL_CARD.md").write_bytes(bytes(42))
    files = json.loads((bundle / MANIFEST).read_text())["files"]
    files["MODEL_CARD.md"] = {"sha256": hashlib.sha256(bytes(42)).hexdigest(), "bytes": size}
    opened = Bundle(rewrite(bundle, files=files))
    with pytest.raises(BundleTamperedError, match=rf"MODEL_CARD\.md has (42|more) bytes, expected {size}: "):
        opened.read("MODEL_CARD.md")


@pytest.mark.parametrize("size", [None, "42", 42.0, True, -1, 1 << 60])
def test_invalid_size_is_refused(bundle: Path, size: object) -> None:
    files = json.loads((bundle / MANIFEST).read_text())["files"]
    files["MODEL_CARD.md"]["bytes"] = size
    with pytest.raises(BundleError, match="expected a plain name with its SHA-256 and size"):
        Bundle(rewrite(bundle, files=files))


@pytest.mark.skipif(os.name != "posix", reason="Windows has none of it")
@pytest.mark.parametrize("name", [MANIFEST, GOLDEN, model_file("fp32")])
def test_pipe_or_device_in_place_of_a_file_does_not_block(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    os.mkfifo(bundle / name)
    with pytest.raises(BundleError, match=rf"{name} cannot be read \(it is no regular file\)"):
        Bundle(bundle).read(name)
    (bundle / name).unlink()
    (bundle / name).symlink_to("/dev/zero")
    with pytest.raises(BundleError, match=rf"{name} cannot be read \(it is no regular file\)"):
        Bundle(bundle).read(name)


@pytest.mark.skipif(os.name != "posix", reason="links need a privilege on Windows")
def test_symlink_is_followed_and_its_target_hashed(bundle: Path, tmp_path: Path) -> None:
    (bundle / GOLDEN).rename(tmp_path / "elsewhere")
    (bundle / GOLDEN).symlink_to(tmp_path / "elsewhere")
    Bundle(bundle).read_golden()
    (tmp_path / "elsewhere").write_bytes(b"something else")
    with pytest.raises(BundleTamperedError):
        Bundle(bundle).read_golden()


def test_oversized_manifest_is_refused(bundle: Path) -> None:
    (bundle / MANIFEST).write_bytes(bytes((1 << 24) + 1))
    with pytest.raises(BundleTamperedError, match=r"bundle\.json is too large; expected at most 16777216 bytes"):
        Bundle(bundle)


@pytest.mark.parametrize(
    "change", [{"schema": "9" * 9999}, {"default_precision": "9" * 9999}, {"files": {"/" * 9999: 0}}]
)
def test_error_messages_truncate_untrusted_values(bundle: Path, change: dict[str, object]) -> None:
    with pytest.raises(BundleError) as caught:
        Bundle(rewrite(bundle, **change))
    assert len(str(caught.value)) < 500


def test_manifest_has_one_encoding() -> None:
    data = encode_manifest({"b": 1, "a": "é"})
    assert data == encode_manifest({"a": "é", "b": 1}) == encode_manifest(json.loads(data))
    assert data.decode("ascii").splitlines()[1].startswith('  "a"')
    assert data.endswith(b"}\n")
    with pytest.raises(ValueError, match="not JSON compliant"):
        encode_manifest({"a": float("inf")})


@pytest.mark.parametrize("classes", [("A", "B", "C"), ("ASD", "NORM")], ids=["another contract", "the same bundle"])
def test_bundle_replaced_since_it_was_opened_is_named_as_such(
    tmp_path: Path, make_tiny_bundle: Make, classes: tuple[str, ...]
) -> None:
    folder = make_tiny_bundle(tmp_path / "bundle")
    opened = Bundle(folder)
    graph = opened.read_model("fp32")
    shutil.rmtree(folder)
    with pytest.raises(BundleError, match="cannot be read") as missing:
        opened.read_model("fp32")
    make_tiny_bundle(folder, classes=classes)
    if classes == opened.contract.classes:
        assert opened.read_model("fp32") == graph
    else:
        with pytest.raises(BundleTamperedError, match="was replaced since it was opened") as replaced:
            opened.read_model("fp32")
        assert (missing.value.code, replaced.value.exit_code) == ("E_BUNDLE", 3)
