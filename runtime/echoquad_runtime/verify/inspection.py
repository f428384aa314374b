"""Inspection: what a bundle says of itself, and whether its files are the ones that it says it of."""

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
UNREAD: Final = 12  # files beside a bundle that are named


@dataclass(frozen=True, slots=True)
class FileState:
    """A file of the manifest's list, with the size and hash that stand there; `fault` is empty where it is whole."""

    name: str
    size: int
    sha256: str
    state: str
    fault: str


@dataclass(frozen=True, slots=True)
class Inspection:
    """What was found.

    Attributes
    ----------
    bundle
        The folder, as it was given.
    manifest
        What ``bundle.json`` holds; its own hash is right.
    files
        The files that it lists.
    unlisted
        What else lies in the folder and is never read.
    signed
        Whether there is a signature; it is not checked here.
    self_tests
        The self-tests that this host remembers as passed; see `cached_self_tests`.
    """

    bundle: str
    manifest: dict[str, Any]
    files: tuple[FileState, ...]
    unlisted: tuple[str, ...]
    signed: bool
    self_tests: tuple[dict[str, Any], ...] = ()

    @property
    def faults(self) -> tuple[str, ...]:
        """What is wrong with the files, a line each; empty where the bundle is whole."""
        return tuple(file.fault for file in self.files if file.fault)

    @property
    def card(self) -> Document:
        """The model card."""
        return model_card(self.manifest)

    @property
    def document(self) -> Document:
        """The model card, and what was found of the files."""
        rows = tuple(
            (format_value(file.name), str(file.size), f"{file.sha256[:12]}...", file.state) for file in self.files
        )
        blocks: list[Block] = [
            Paragraph(f"{MANIFEST} has the SHA-256 {self.manifest['manifest_sha256']} of its content, and is whole."),
            Table(("file", "bytes", "SHA-256", "state"), rows),
        ]
        if self.signed:
            blocks.append(Paragraph(f"A signature, {SIGNATURE}, lies beside it. It was not checked here."))
        if self.unlisted:
            more = [f"and {len(self.unlisted) - UNREAD} more"] if len(self.unlisted) > UNREAD else []
            blocks.append(Paragraph("Not of the bundle, and never read:"))
            blocks.append(BulletList((*map(format_value, self.unlisted[:UNREAD]), *more)))
        sections = (Section("Files", tuple(blocks)), Section("Self-tests on this host", self._self_test_blocks()))
        return Document(self.card.title, (*self.card.sections, *sections))

    def _self_test_blocks(self) -> tuple[Block, ...]:
        if not self.self_tests:
            return (Paragraph("None is remembered. A predictor tests itself before its first answer."),)
        names = ("precision", "device", "threads", "frames", "created")
        rows = tuple(tuple(format_value(str(test.get(name))) for name in names) for test in self.self_tests)
        return (Table(("precision", "device", "threads", "frames at a time", "passed on"), rows),)

    def to_dict(self) -> dict[str, Any]:
        """Give it as JSON values."""
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
    """Read a bundle's manifest and hash every file that it lists.

    Files that are missing or changed are in the result; they are no error.

    Raises
    ------
    BundleError
        If there is no manifest, or it is malformed or changed.
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
