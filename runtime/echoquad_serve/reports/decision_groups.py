"""Frames of an object by decision, which is how a report summarises a clip."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from echoquad_runtime.contract import INDETERMINATE

__all__ = ["DecisionGroup", "group_rows"]

_FRAME: Final = re.compile(r"#([0-9]{1,9})$")
_PROBABILITY: Final = "prob_"


@dataclass(frozen=True, slots=True)
class DecisionGroup:
    """The frames of an object that have the same decision.

    Attributes
    ----------
    label
        The decision: a class, or ``INDETERMINATE``.
    indices
        Indices of their rows in the result, in its order.
    rows
        These rows.
    """

    label: str
    indices: tuple[int, ...]
    rows: tuple[Mapping[str, Any], ...]

    @property
    def frame_numbers(self) -> list[int]:
        """Numbers of the frames, from 1; empty if a row does not name one."""
        numbers = [number for number in map(_frame_number, self.rows) if number is not None]
        return numbers if len(numbers) == len(self.rows) else []

    @property
    def confidence(self) -> float:
        """Mean of the frames' confidence, 0 to 1."""
        return sum(map(_confidence, self.rows)) / len(self.rows)

    @property
    def clearest(self) -> int:
        """Index of the row with the highest confidence; the first of several."""
        return max(zip(self.indices, map(_confidence, self.rows), strict=True), key=lambda pair: pair[1])[0]

    @property
    def clearest_frame(self) -> int | None:
        """Number of that row's frame; None if the row does not name one."""
        return _frame_number(self.rows[self.indices.index(self.clearest)])

    @property
    def probabilities(self) -> dict[str, float]:
        """Mean probability of each class over the frames."""
        names = [key for key in self.rows[0] if key.startswith(_PROBABILITY)]
        return {
            name.removeprefix(_PROBABILITY): sum(_number(row.get(name)) for row in self.rows) / len(self.rows)
            for name in names
        }

    def distinct(self, key: str) -> list[str]:
        """Return the different values of a column, in the order of the rows, without empty ones."""
        return list(dict.fromkeys(str(row[key]) for row in self.rows if row.get(key) not in (None, "")))

    def flags(self) -> dict[str, int]:
        """Return the number of frames with each flag, in the order of their first appearance."""
        counts: dict[str, int] = {}
        for row in self.rows:
            for flag in row.get("flags") or ():
                counts[str(flag)] = counts.get(str(flag), 0) + 1
        return counts


def group_rows(rows: Sequence[Mapping[str, Any]]) -> list[DecisionGroup]:
    """Group rows by decision: the decision with most frames first, ``INDETERMINATE`` last."""
    found: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        found.setdefault(str(row["pred_image"]), []).append(index)
    groups = [
        DecisionGroup(label, tuple(indices), tuple(rows[index] for index in indices))
        for label, indices in found.items()
    ]
    return sorted(groups, key=lambda group: (group.label == INDETERMINATE, -len(group.rows), group.label))


def _frame_number(row: Mapping[str, Any]) -> int | None:
    match = _FRAME.search(str(row.get("file", "")))
    return int(match[1]) if match else None


def _confidence(row: Mapping[str, Any]) -> float:
    """Return the calibrated confidence of a row, or the mean probability that it derives from."""
    if row.get("confidence") is not None:
        return min(max(_number(row["confidence"]), 0.0), 1.0)
    probabilities = [_number(value) for key, value in row.items() if key.startswith(_PROBABILITY)]
    return _number(row.get(f"{_PROBABILITY}{row['pred_image']}")) or max(probabilities, default=0.0)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else 0.0
