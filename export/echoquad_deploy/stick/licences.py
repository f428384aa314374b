"""Licences of the packages on a stick: their texts, and a table."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from echoquad_deploy.stick.wheel_file import WheelFile
from echoquad_runtime.storage.atomic import make_folder, write_bytes

__all__ = ["write_licences"]

_NO_TEXT: Final = "none in the wheel"


def write_licences(folder: Path, wheels: Iterable[WheelFile]) -> list[str]:
    """Write the licence texts of wheels as ``NAME-VERSION/...`` and a table of them as ``README.txt``.

    Parameters
    ----------
    folder
        The folder for them.
    wheels
        The wheels.

    Returns
    -------
    list of str
        Names of the packages whose wheels hold no licence text. The table says so too.

    Raises
    ------
    WheelhouseError
        If a wheel cannot be read.
    OutputError
        If a file cannot be written.
    """
    rows, without = [("package", "version", "licence", "texts")], []
    for wheel in wheels:
        place, used = folder / f"{wheel.name}-{wheel.version}", set[str]()
        for relative, data in wheel.licence_texts():
            path = place / relative
            while path.as_posix().lower() in used:  # names that differ in case only are one on a USB stick
                path = path.with_name(f"{path.name}_")
            used.add(path.as_posix().lower())
            make_folder(path.parent)
            write_bytes(path, data)
        if not used:
            without.append(wheel.name)
        rows.append((wheel.name, wheel.version, wheel.licence or "not stated", str(len(used) or _NO_TEXT)))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    intro = "Licences of the packages in wheels/, as their metadata name them. The texts are in NAME-VERSION/.\n\n"
    make_folder(folder)
    write_bytes(folder / "README.txt", (intro + "\n".join(lines) + "\n").encode("utf-8"))
    return without
