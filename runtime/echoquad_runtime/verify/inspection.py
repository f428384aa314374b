"""Inspection: show the manifest of a bundle, and check its files against the hashes in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.bundle.document import Block, BulletList, Document, Paragraph, Section, Table
from echoquad_runtime.bundle.manifest import MANIFEST, SIGNATURE
from echoquad_runtime.bundle.model_card import format_value, model_card
from echoquad_runtime.engine.self_test import cached_self_tests
from echoquad_runtime.errors import BundleError, BundleTamperedError

__all__ = ["FileState", "Inspection", "inspect_bundle"]

SCHEMA: Final = 1
MAX_UNLISTED: Final = 12  # unlisted files that are named


@dataclass(frozen=True, slots=True)
class FileState:
    """A file in the manifest, with the size and hash listed there; `fault` is empty if the file has both."""

    name: str
    size: int
    sha256: str
    state: str
    fault: str


@dataclass(frozen=True, slots=True)
class Inspection:
    """The result of an inspection.

    Attributes
    ----------
    bundle
        The folder, as given.
    manifest
        The content of ``bundle.json``, whose own hash is right.
    files
        The files listed in the manifest.
    unlisted
        Other files in the folder, which are never read.
    signed
        Whether there is a signature; an inspection does not check it.
    self_tests
        Self-tests that passed on this host before; see `cached_self_tests`.
    """

    bundle: str
    manifest: dict[str, Any]
    files: tuple[FileState, ...]
    unlisted: tuple[str, ...]
    signed: bool
    self_tests: tuple[dict[str, Any], ...] = ()

    @property
    def faults(self) -> tuple[str, ...]:
        """One line per damaged file; empty if the bundle is intact."""
        return tuple(file.fault for file in self.files if file.fault)

    @property
    def card(self) -> Document:
        """The model card."""
        return model_card(self.manifest)

    @property
    def document(self) -> Document:
        """The model card, and the state of the files."""
        rows = tuple(
            (format_value(file.name), str(file.size), f"{file.sha256[:12]}...", file.state) for file in self.files
        )
        blocks: list[Block] = [
            Paragraph(f"{MANIFEST} is intact; the SHA-256 of its content is {self.manifest['manifest_sha256']}."),
            Table(("file", "bytes", "SHA-256", "state"), rows),
        ]
        if self.signed:
            blocks.append(Paragraph(f"There is a signature, {SIGNATURE}. It was not checked here."))
        if self.unlisted:
            more = [f"and {len(self.unlisted) - MAX_UNLISTED} more"] if len(self.unlisted) > MAX_UNLISTED else []
            blocks.append(Paragraph("Other files in the folder, which are never read:"))
            blocks.append(BulletList((*map(format_value, self.unlisted[:MAX_UNLISTED]), *more)))
        sections = (Section("Files", tuple(blocks)), Section("Self-tests on this host", self._self_test_blocks()))
        return Document(self.card.title, (*self.card.sections, *sections))

    def _self_test_blocks(self) -> tuple[Block, ...]:
        if not self.self_tests:
            return (Paragraph("None is remembered. A predictor runs one before its first prediction."),)
        names = ("precision", "device", "threads", "frames", "created")
        rows = tuple(tuple(format_value(str(test.get(name))) for name in names) for test in self.self_tests)
        return (Table(("precision", "device", "threads", "frames at a time", "passed on"), rows),)

    def to_dict(self) -> dict[str, Any]:
        """Return the inspection as JSON values."""
        return {
            "schema": SCHEMA,
            "bundle": self.bundle,
            "whole": not self.faults,
            "files": {
                file.name: {"bytes": file.size, "sha256": file.sha256, "state": file.state, "fault": file.fault or None}
                for file in self.files
            },
            "unlisted": list(self.unlisted),
            "signature": SIGNATURE if self.signed else None,
            "self_tests": list(self.self_tests),
            "manifest": self.manifest,
        }


def inspect_bundle(folder: str | Path) -> Inspection:
    """Read a bundle's manifest and hash every file listed in it.

    Missing and changed files are reported in the result, not raised.

    Raises
    ------
    BundleError
        If the manifest is missing, malformed or changed.
    """
    bundle = Bundle(folder)
    files = tuple(_file(bundle, name, entry) for name, entry in bundle.manifest["files"].items())
    known = {MANIFEST, SIGNATURE, *bundle.manifest["files"]}
    found = {path.name for path in bundle.folder.iterdir()}
    return Inspection(
        bundle.folder.as_posix(),
        bundle.manifest,
        files,
        tuple(sorted(found - known)),
        SIGNATURE in found,
        tuple(cached_self_tests(bundle)),
    )


def _file(bundle: Bundle, name: str, entry: dict[str, Any]) -> FileState:
    state, fault = "whole", ""
    try:
        bundle.read(name)
    except BundleTamperedError as error:
        state, fault = "CHANGED", str(error)
    except BundleError as error:
        state, fault = "MISSING" if not (bundle.folder / name).exists() else "UNREADABLE", str(error)
    return FileState(name, entry["bytes"], entry["sha256"], state, fault)
