"""Counts of a run of ``echoquad predict``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from echoquad.cli.framework.console import EXIT_PARTIAL, print_failure

if TYPE_CHECKING:
    from echoquad_runtime.frames.frame_file import Failure

__all__ = ["Tally"]


class Tally:
    """Counts decisions by class, and remembers the first failure.

    Attributes
    ----------
    labels
        Number of frames by decision.
    unlike
        Number of frames unlike the training frames, whatever their decision.
    seconds
        Wall time of the prediction.
    """

    def __init__(self) -> None:
        self.labels: Counter[str] = Counter()
        self.unlike = 0
        self.seconds = 0.0
        self._failure: Failure | None = None  # only the first: there may be a million

    @property
    def frames(self) -> int:
        """Number of frames with a decision."""
        return self.labels.total()

    def fail(self, failure: Failure) -> None:
        """Print a failure and remember it."""
        self._failure = self._failure or failure
        print_failure(failure)

    def summary(self, classes: Sequence[str], kept: int) -> list[str]:
        """Return phrases that sum up the run; `kept` is the number of rows from before."""
        from echoquad_runtime.contract import INDETERMINATE

        if not self.frames:
            return [f"no new frame; {kept} rows were there" if kept else "no frame in this shard"]
        undecided = [INDETERMINATE] if self.labels[INDETERMINATE] else []
        shares = ", ".join(f"{self.labels[name]} {name}" for name in [*classes, *undecided])
        phrases = [
            f"{self.frames} frames: {shares}",
            *([f"{self.unlike} unlike the training frames"] if self.unlike else []),
            f"{self.frames / self.seconds:.1f} frames per second",
        ]
        return [*phrases, f"{kept} rows were there"] if kept else phrases

    def exit_code(self, rows: int) -> int:
        """Return the exit code of a run whose result has `rows` rows."""
        if self._failure is None:
            return 0
        return EXIT_PARTIAL if rows else self._failure.error.exit_code
