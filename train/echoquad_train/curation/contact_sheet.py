"""Contact sheet: an audit as one picture with samples, the mean frame of each class, and the duplicates.

A person sees at a glance what no rule covers: another view, a burnt-in clock, frames upside down.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from echoquad_runtime.errors import EchoQuadError
from echoquad_runtime.quadrants import Grey
from echoquad_runtime.storage.row_names import display_name
from echoquad_train.curation.audit import Audit
from echoquad_train.data.dataset import LabelledFrame
from echoquad_train.data.frame_list import read_all
from echoquad_train.plot_style import BLUE, GREY, VERMILION, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from echoquad_train.curation.leaks import DuplicateGroup

__all__ = ["contact_sheet", "write_contact_sheet"]

COLUMNS: Final = 6
CLASSES: Final = 8  # classes with samples, per split
DUPLICATES: Final = 12  # duplicate groups shown
_INCH: Final = 1.9  # a picture's side


def write_contact_sheet(audit: Audit, path: Path) -> None:
    """Write the contact sheet of an audit as PNG.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    save(contact_sheet(audit), path)


def contact_sheet(audit: Audit) -> Figure:
    """Draw rows of samples, a row of mean frames, and rows of duplicates, leaks first."""
    leaks = audit.leaks
    duplicates = sorted((*leaks.exact, *leaks.near), key=lambda group: not group.leak)[:DUPLICATES]
    samples = _samples(audit)
    shown = {frame.name: frame for row in samples for frame in row}
    by_name = {frame.name: frame for frame in audit.readable}
    shown |= {name: by_name[name] for group in duplicates for name in _two_of(group)}
    pixels = {
        frame.name: content.grey
        for frame, content in read_all(list(shown.values()))
        if not isinstance(content, EchoQuadError)  # removed since the audit
    }
    per_row = COLUMNS // 2
    duplicate_rows = [duplicates[start : start + per_row] for start in range(0, len(duplicates), per_row)]
    rows = len(samples) + 1 + len(duplicate_rows)
    figure = Figure(
        figsize=(COLUMNS * _INCH + 0.6, rows * (_INCH + 0.35) + 0.8),
        layout=ConstrainedLayoutEngine(h_pad=0.06, w_pad=0.03),
    )
    figure.suptitle(_headline(audit), fontsize=11, color=VERMILION if leaks.found else "black")
    grid = figure.subplots(rows, COLUMNS, squeeze=False)
    for axes in grid.ravel():
        axes.set_axis_off()
    for row, frames in zip(grid, samples, strict=False):
        _row_title(row[0], f"{frames[0].split}\n{display_name(frames[0].class_name)}")
        for axes, frame in zip(row, frames, strict=False):
            _show(axes, pixels.get(frame.name), _short(frame.name.split("/", 2)[2]))
    row = grid[len(samples)]
    _row_title(row[0], "mean\nframe")
    for axes, (title, picture, signed) in zip(row, _mean_frames(audit), strict=False):
        _show_mean(axes, title, picture, signed=signed)
    for row, groups in zip(grid[len(samples) + 1 :], duplicate_rows, strict=True):
        _row_title(row[0], "duplicates")
        for index, group in enumerate(groups):
            _show_duplicates(row[2 * index], row[2 * index + 1], group, pixels)
    return figure


def _headline(audit: Audit) -> str:
    leaks, flagged = audit.leaks, {shortcut.kind for shortcut in audit.flagged}
    hidden = max(0, len(leaks.exact) + len(leaks.near) - DUPLICATES)
    lines = [
        f"{display_name(audit.data.resolve().name)}: {len(audit.frames)} frames, {len(audit.failures)} unreadable",
        leaks.summary.removesuffix("; see `echoquad data audit`"),
        f"shortcuts: {', '.join(sorted(flagged)) or 'none'}",
    ]
    return "\n".join(lines + ([f"{hidden} more duplicates are in audit.json"] if hidden else []))


def _samples(audit: Audit) -> list[list[LabelledFrame]]:
    """Return a row of frames for each split and class, evenly spread over the frame names."""
    rows = []
    for split in dict.fromkeys(frame.split for frame in audit.frames):
        for name in audit.class_names[:CLASSES]:
            frames = [frame for frame in audit.readable if (frame.split, frame.class_name) == (split, name)]
            indices = np.linspace(0, len(frames) - 1, min(COLUMNS, len(frames))).round().astype(int)
            if frames:
                rows.append([frames[index] for index in indices])
    return rows


def _mean_frames(audit: Audit) -> list[tuple[str, npt.NDArray[np.float64], bool]]:
    """Return title, mean thumbnail and False for each class; for two classes also their difference and True."""
    labels = np.array([frame.class_name for frame in audit.readable])
    thumbnails = np.stack(audit.thumbnails)
    present = [name for name in audit.class_names if (labels == name).any()][:COLUMNS]
    means = {name: thumbnails[labels == name].mean(axis=0) for name in present}
    pictures = [(f"{display_name(name)}, {(labels == name).sum()} frames", mean, False) for name, mean in means.items()]
    if len(means) == 2:
        (first, one), (second, other) = means.items()
        pictures.append((f"{display_name(first)} minus {display_name(second)}", one - other, True))
    return pictures


def _show_duplicates(left: Axes, right: Axes, group: DuplicateGroup, pixels: dict[str, Grey]) -> None:
    colour = VERMILION if group.leak else BLUE
    names = _two_of(group)
    title = "LEAK: " if group.leak else ""
    title += {"file": "same file", "pixels": "same pixels", "near": f"similarity {group.similarity:.3f}"}[group.kind]
    title += f", {len(group.names)} in all" if len(group.names) > 2 else ""
    title += "" if len(set(group.patients)) == 1 else ", other patient"
    for axes, name in zip((left, right), names, strict=True):
        _show(axes, pixels.get(name), _short(name), colour=colour)
        axes.set_axis_on()
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(edgecolor=colour, linewidth=2.5)
    left.set_title(title, fontsize=8, color=colour, loc="left", fontweight="bold")


def _two_of(group: DuplicateGroup) -> tuple[str, str]:
    """Return two of the frames, from different splits if there are several."""
    first = group.names[0]
    others = [name for name in group.names[1:] if name.partition("/")[0] != first.partition("/")[0]]
    return first, (others or group.names[1:])[0]


def _show(axes: Axes, grey: Grey | None, caption: str, colour: str = "black") -> None:
    if grey is None:
        axes.text(0.5, 0.5, "cannot be\nread", ha="center", transform=axes.transAxes, fontsize=8)
    else:
        axes.imshow(grey, cmap="gray", vmin=0, vmax=255)
    _caption(axes, caption, colour)


def _show_mean(axes: Axes, title: str, picture: npt.NDArray[np.float64], *, signed: bool) -> None:
    bound = max(float(np.abs(picture).max()), 1.0)
    style: dict[str, Any] = {"cmap": "RdBu_r", "vmin": -bound, "vmax": bound} if signed else {"cmap": "gray", "vmin": 0}
    axes.imshow(picture, **style)
    _caption(axes, f"{title}, up to {bound:.0f} grey levels" if signed else title, "black")


def _caption(axes: Axes, text: str, colour: str) -> None:
    axes.text(0.5, -0.04, text, ha="center", va="top", transform=axes.transAxes, fontsize=6.5, color=colour)


def _row_title(axes: Axes, text: str) -> None:
    axes.text(-0.06, 0.5, text, ha="right", va="center", rotation=90, transform=axes.transAxes, fontsize=8, color=GREY)


def _short(name: str, width: int = 34) -> str:
    text = display_name(name)
    return text if len(text) <= width else f"...{text[3 - width :]}"
