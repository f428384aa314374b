"""Tests of bundle inspection: intact, damaged and unlisted files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from echoquad_runtime.bundle.document import BulletList, Table
from echoquad_runtime.bundle.manifest import SIGNATURE
from echoquad_runtime.errors import BundleNotFoundError, BundleTamperedError
from echoquad_runtime.verify.inspection import Inspection, inspect_bundle

Make = Callable[..., Path]


def files_of(found: Inspection) -> list[tuple[str, ...]]:
    section = found.document.sections[-2]
    assert section.title == "Files"
    return [row for block in section.blocks if isinstance(block, Table) for row in block.rows]


def test_intact_bundle(tiny_bundle: Path) -> None:
    found = inspect_bundle(tiny_bundle)
    manifest = json.loads((tiny_bundle / "bundle.json").read_text("ascii"))
    assert (found.manifest, found.faults, found.unlisted, found.signed) == (manifest, (), (), False)
    assert {file.name: (file.size, file.sha256) for file in found.files} == {
        name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()
    }
    for name, size, digest, state in files_of(found):
        assert state == "whole"
        assert size == str((tiny_bundle / name).stat().st_size)
        assert digest == manifest["files"][name]["sha256"][:12] + "..."
    assert found.document.sections[:-2] == found.card.sections
    assert manifest["manifest_sha256"] in str(found.document.sections[-2])
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False)) == found.to_dict()
    assert found.to_dict()["whole"] is True


def test_damaged_files_are_reported(tmp_path: Path, make_tiny_bundle: Make) -> None:
    folder = make_tiny_bundle(tmp_path / "bundle", precisions=("fp32", "int8"))
    (folder / "MODEL_CARD.md").write_text("another")
    (folder / "golden.npz").unlink()
    (folder / "model.int8.onnx").unlink()
    (folder / "model.int8.onnx").mkdir()
    found = inspect_bundle(folder)
    assert {file.name: file.state for file in found.files} == {
        "MODEL_CARD.md": "CHANGED",
        "golden.npz": "MISSING",
        "model.int8.onnx": "UNREADABLE",
        "model.fp32.onnx": "whole",
    }
    assert len(found.faults) == 3
    for name in ("MODEL_CARD.md", "golden.npz", "model.int8.onnx"):
        assert sum(name in fault for fault in found.faults) == 1
    assert found.to_dict()["whole"] is False
    assert found.to_dict()["files"]["golden.npz"]["fault"].endswith("copy the whole bundle again")


def test_unlisted_files_and_signature_are_reported(tmp_path: Path, make_tiny_bundle: Make) -> None:
    folder = make_tiny_bundle(tmp_path / "bundle")
    (folder / SIGNATURE).write_bytes(b"{}")
    for index in range(14):
        (folder / f"more-{index:02d}.txt").write_text("")
    found = inspect_bundle(folder)
    assert found.signed and len(found.unlisted) == 14 and found.faults == ()
    assert found.to_dict()["signature"] == SIGNATURE
    section = found.document.sections[-2]
    assert "It was not checked here." in str(section)
    (items,) = [block for block in section.blocks if isinstance(block, BulletList)]
    assert items.lines[0] == "more-00.txt" and items.lines[-1] == "and 2 more" and len(items.lines) == 13


def test_missing_or_damaged_manifest_raises(tmp_path: Path, make_tiny_bundle: Make) -> None:
    with pytest.raises(BundleNotFoundError):
        inspect_bundle(tmp_path)
    folder = make_tiny_bundle(tmp_path / "bundle")
    (folder / "bundle.json").write_bytes((folder / "bundle.json").read_bytes().replace(b"tiny", b"tony"))
    with pytest.raises(BundleTamperedError):
        inspect_bundle(folder)
