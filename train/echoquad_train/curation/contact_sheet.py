"""The contact sheet: an audit as one picture. Samples of every split and class, the classes' mean frames, the twins.

A person sees at a glance what no rule was written for: another view, a burnt-in clock, frames upside down.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from echoquad_runtime.errors import EchoQuadError
from echoquad_runtime.overlay.palette import BLUE, GREY, VERMILION
from echoquad_runtime.quadrants import Grey
from echoquad_runtime.storage.row_names import display_name
from echoquad_train.curation.audit import Audit
from echoquad_train.data.frame_list import FrameRecord, read_all
from echoquad_train.plot_style import save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from echoquad_train.curation.leaks import DuplicateGroup

__all__ = ["contact_sheet", "write_contact_sheet"]

COLUMNS: Final = 6
CLASSES: Final = 8  # of which samples are shown, of each split
TWINS: Final = 12  # that are shown side by side

_INCH: Final = 1.9  # a picture's side
_LEAK, _TWIN, _QUIET = VERMILION, BLUE, GREY


def write_contact_sheet(audit: Audit, path: Path) -> None:
    """Draw an audit as PNG.

    Raises
    ------
    OutputError
        If the system refuses.
    """
    save(contact_sheet(audit), path)


def contact_sheet(audit: Audit) -> Figure:
    """Draw an audit: rows of samples, a row of mean frames, rows of twins, leaks first."""
    leaks = audit.leaks
    twins = sorted((*leaks.exact, *leaks.near), key=lambda one: not one.leak)[:TWINS]
    chosen = _samples(audit)
    wanted = {frame.name: frame for row in chosen for frame in row}
    by_name = {frame.name: frame for frame in audit.read}
    wanted |= {name: by_name[name] for pair in twins for name in _ends(pair)}
    pixels = {
        frame.name: content.grey
        for frame, content in read_all(list(wanted.values()))
        if not isinstance(content, EchoQuadError)  # gone since the audit
    }
    means = _means(audit)
    groups = [twins[start : start + COLUMNS // 2] for start in range(0, len(twins), COLUMNS // 2)]
    rows = len(chosen) + 1 + len(groups)
    figure = Figure(
        figsize=(COLUMNS * _INCH + 0.6, rows * (_INCH + 0.35) + 0.8),
        layout=ConstrainedLayoutEngine(h_pad=0.06, w_pad=0.03),
    )
    figure.suptitle(_headline(audit), fontsize=11, color=_LEAK if leaks.found else "black")
    grid = figure.subplots(rows, COLUMNS, squeeze=False)
    for axes in grid.ravel():
        axes.set_axis_off()
    for row, frames in zip(grid, chosen, strict=False):
        _label(row[0], f"{frames[0].split}\n{display_name(frames[0].label)}")
        for axes, frame in zip(row, frames, strict=False):
            _show(axes, pixels.get(frame.name), _short(frame.name.split("/", 2)[2]))
    row = grid[len(chosen)]
    _label(row[0], "mean\nframe")
    for axes, (title, picture, signed) in zip(row, means, strict=False):
        _show_mean(axes, title, picture, signed=signed)
    for row, group in zip(grid[len(chosen) + 1 :], groups, strict=True):
        _label(row[0], "twins")
        for place, pair in enumerate(group):
            _show_twins(row[2 * place], row[2 * place + 1], pair, pixels)
    return figure


def _headline(audit: Audit) -> str:
    leaks, flagged = audit.leaks, {shortcut.kind for shortcut in audit.flagged}
    hidden = max(0, len(leaks.exact) + len(leaks.near) - TWINS)
    lines = [
        f"{display_name(audit.data.resolve().name)}: {len(audit.frames)} frames, {len(audit.failures)} unreadable",
        leaks.line.removesuffix("; see `echoquad data audit`"),
        f"shortcuts: {', '.join(sorted(flagged)) or 'none'}",
    ]
    return "\n".join(lines + ([f"{hidden} more twins are in audit.json"] if hidden else []))


def _samples(audit: Audit) -> list[list[FrameRecord]]:
    """Choose frames of each split and class, evenly over its patients' names."""
    rows = []
    for split in dict.fromkeys(frame.split for frame in audit.frames):
        for name in audit.names[:CLASSES]:
            frames = [frame for frame in audit.read if (frame.split, frame.label) == (split, name)]
            places = np.linspace(0, len(frames) - 1, min(COLUMNS, len(frames))).round().astype(int)
            if frames:
                rows.append([frames[place] for place in places])
    return rows


def _means(audit: Audit) -> list[tuple[str, npt.NDArray[np.float64], bool]]:
    """Give each class's mean picture, and of two classes their difference."""
    labels = np.array([frame.label for frame in audit.read])
    thumbs = np.stack(audit.thumbs)
    present = [name for name in audit.names if (labels == name).any()][:COLUMNS]
    means = {name: thumbs[labels == name].mean(axis=0) for name in present}
    pictures = [(f"{display_name(name)}, {(labels == name).sum()} frames", mean, False) for name, mean in means.items()]
    if len(means) == 2:
        (first, one), (second, other) = means.items()
        pictures.append((f"{display_name(first)} less {display_name(second)}", one - other, True))
    return pictures


def _show_twins(left: Axes, right: Axes, twins: DuplicateGroup, pixels: dict[str, Grey]) -> None:
    colour = _LEAK if twins.leak else _TWIN
    names = _ends(twins)
    more = f", {len(twins.names)} in all" if len(twins.names) > 2 else ""
    more += "" if len(set(twins.patients)) == 1 else ", other patient"
    kind = {"file": "same file", "pixels": "same pixels", "near": f"alike {twins.likeness:.3f}"}[twins.kind]
    for axes, name, title in zip(
        (left, right), names, (f"{'LEAK: ' if twins.leak else ''}{kind}{more}", ""), strict=True
    ):
        _show(axes, pixels.get(name), _short(name), below=colour)
        axes.set_axis_on()
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(edgecolor=colour, linewidth=2.5)
        axes.set_title(title, fontsize=8, color=colour, loc="left", fontweight="bold")


def _ends(twins: DuplicateGroup) -> tuple[str, str]:
    """Give two of the frames, of different splits where they are in several."""
    first = twins.names[0]
    others = [name for name in twins.names[1:] if name.partition("/")[0] != first.partition("/")[0]]
    return first, (others or twins.names[1:])[0]


def _show(axes: Axes, grey: Grey | None, caption: str, below: str = "black") -> None:
    if grey is None:
        axes.text(0.5, 0.5, "cannot be\nread", ha="center", transform=axes.transAxes, fontsize=8)
    else:
        axes.imshow(grey, cmap="gray", vmin=0, vmax=255)
    axes.text(0.5, -0.04, caption, ha="center", va="top", transform=axes.transAxes, fontsize=6.5, color=below)


def _show_mean(axes: Axes, title: str, picture: npt.NDArray[np.float64], *, signed: bool) -> None:
    bound = max(float(np.abs(picture).max()), 1.0)
    style: dict[str, Any] = {"cmap": "RdBu_r", "vmin": -bound, "vmax": bound} if signed else {"cmap": "gray", "vmin": 0}
    axes.imshow(picture, **style)
    note = f", up to {bound:.0f} grey levels" if signed else ""
    axes.text(0.5, -0.04, title + note, ha="center", va="top", transform=axes.transAxes, fontsize=6.5)


def _label(axes: Axes, text: str) -> None:
    axes.text(
        -0.06, 0.5, text, ha="right", va="center", rotation=90, transform=axes.transAxes, fontsize=8, color=_QUIET
    )


def _short(name: str, width: int = 34) -> str:
    text = display_name(name)
    return text if len(text) <= width else f"...{text[3 - width :]}"
