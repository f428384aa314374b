"""Files and folders that operating systems, network storage and other programs leave in people's folders.

They hold thumbnails, copies of deleted files or settings, and are never frames: a thumbnail of a frame is named as the
frame is.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

__all__ = ["SkippedEntries", "is_system_name"]

_SYSTEM_NAMES: Final = {
    name.casefold(): name
    for name in (
        # Synology, QNAP
        *("@eaDir", "#recycle", "#snapshot", "@Recycle", "@Recently-Snapshot", "@tmp"),
        # Windows
        *("$RECYCLE.BIN", "RECYCLER", "System Volume Information", "Thumbs.db", "ehthumbs.db", "desktop.ini"),
        # macOS; the others that it writes begin with a dot
        *("__MACOSX", "Network Trash Folder", "Temporary Items", "Icon\r"),
        # Linux, Python
        *("lost+found", "__pycache__"),
        # hidden names that the count shows by name
        *(".DS_Store", ".git", ".thumbnails", ".ipynb_checkpoints", ".Trashes", ".Spotlight-V100", ".fseventsd"),
    )
}
_APPLE_DOUBLE: Final = "._"
_UNFINISHED: Final = ".partial"


def is_system_name(name: str) -> bool:
    """Return whether a file or folder is hidden or belongs to the system, such as ``.git``, ``@eaDir``, ``Thumbs.db``.

    Names that begin with a dot are hidden, among them the ``._name.png`` that macOS writes on foreign disks.
    """
    return name.startswith(".") or name.casefold() in _SYSTEM_NAMES


class SkippedEntries:
    """Counts the hidden and system entries that a walk skipped; a skipped folder counts once, whatever it holds."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def add(self, name: str) -> None:
        """Count an entry. Unfinished files of EchoQuad itself are not counted."""
        if name.startswith(_APPLE_DOUBLE):
            self.counts[f"{_APPLE_DOUBLE}*"] += 1
        elif not (name.startswith(".") and name.endswith(_UNFINISHED)):
            self.counts[_SYSTEM_NAMES.get(name.casefold(), "other hidden").strip()] += 1

    @property
    def total(self) -> int:
        """Number of entries."""
        return self.counts.total()

    @property
    def summary(self) -> str:
        """The counts in one line; empty if nothing was skipped."""
        if not self.total:
            return ""
        kinds = ", ".join(f"{name} {count}" for name, count in sorted(self.counts.items()))
        return f"skipped {self.total} hidden or system {'entry' if self.total == 1 else 'entries'} ({kinds})"
