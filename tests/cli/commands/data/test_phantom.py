"""``echoquad data phantom``: a synthetic data set. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def test_phantom_writes_three_splits_by_class(phantoms: tuple[Path, Any], left_in: Callable[..., Any]) -> None:
    folder, ran = phantoms
    assert ran.out == "train: ASD 2, NORM 2\nvalidation: ASD 2, NORM 2\ntest: ASD 2, NORM 2\n"
    assert ran.err == f"wrote {folder.as_posix()}/\n"
    assert len(list(folder.glob("*/*/*.png"))) == 12
    assert left_in(folder.parent) == []


def test_invalid_phantom_options_and_folders_are_refused(data: Path, many: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("text")
    refusals = [
        ("E_OUTPUT", [data], "new or empty folder"),
        ("E_OUTPUT", [file], "new or empty folder"),
        ("E_OUTPUT", [file / "below"], file.as_posix()),
        ("E_CONFIG", [tmp_path / "new", "--patients", "5"], "6 or more"),
        ("E_CONFIG", [tmp_path / "new", "--frames", "0"], "1 or more"),
        ("E_CONFIG", [tmp_path / "new", "--seed", "-1"], "seed"),
    ]
    found, modules = many([["data", "phantom", *words] for _, words, _ in refusals])
    for (code, line, words), ran in zip(refusals, found, strict=True):
        assert (ran.code, ran.out, len(ran.err.splitlines()), ran.error_codes) == (1, "", 1, [code]), (line, ran)
        assert words in ran.errors[0], (line, ran)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert "torch" not in modules
