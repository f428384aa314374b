"""Names in rows: spreadsheet formulas, sort order, digests, and display on a terminal."""

from __future__ import annotations

import os
from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echoquad_runtime.storage.row_names import (
    display_name,
    encode_text,
    escape_formula,
    name_digest,
    to_row_name,
    walk_sort_key,
)

FORMULAS = ["=1+1.png", "+a.png", "-a.png", "@SUM(A1).png", "\ta.png", "\ra.png", "\na.png", " =a.png", "\uff1da.png"]
PLAIN = ["a.png", "a=b.png", "a/=b.png", "./a.png", "0.png", "", ".png", " a.png", "'=a.png", "é.png", "#a.png"]

# Any name on a disk: no null character; no part is empty, "." or "..".
part = st.text(st.characters(exclude_characters="\0/"), min_size=1).filter(lambda text: text not in (".", ".."))
path = st.lists(part, min_size=1, max_size=4).map("/".join)


@pytest.mark.parametrize("name", FORMULAS)
def test_name_that_is_a_formula_becomes_the_same_path_without_formula(name: str) -> None:
    assert to_row_name(name) == f"./{name}"
    assert PurePosixPath(to_row_name(name)) == PurePosixPath(name)
    assert escape_formula(name) == f"'{name}"


@pytest.mark.parametrize("name", PLAIN)
def test_other_names_are_unchanged(name: str) -> None:
    assert to_row_name(name) == escape_formula(name) == name


@given(path)
def test_row_name_is_the_same_path_and_not_a_formula(name: str) -> None:
    assert PurePosixPath(to_row_name(name)) == PurePosixPath(name)
    assert to_row_name(name).lstrip()[:1] not in {*"=+-@"}
    assert to_row_name(name)[:1] not in {*"\t\r\n"}
    assert to_row_name(to_row_name(name)) == to_row_name(name)


@given(path, path)
def test_row_names_differ_if_paths_differ(one: str, other: str) -> None:
    assert (name_digest(to_row_name(one)) == name_digest(to_row_name(other))) == (one == other)


def test_digest_is_fixed() -> None:
    # Several machines and releases compute the shards of one archive.
    assert name_digest("a/1.png").hex() == "4c9297bc24f32c0fa008ef8b092077de"
    assert name_digest("a\udcff.png") == name_digest("a\\udcff.png")  # as read back from a row


@given(st.lists(path, max_size=8))
def test_walk_order_compares_folder_by_folder(names: list[str]) -> None:
    expected = sorted(names, key=lambda name: name.split("/"))
    assert sorted(names, key=lambda name: walk_sort_key(to_row_name(name))) == expected


def test_walk_order_of_names_that_are_not_utf_8() -> None:
    names = ["z.png", "\ue000.png", os.fsdecode(b"\xff.png") if os.name != "nt" else "\udcff.png", "\\a.png"]
    written = [encode_text(to_row_name(name)).decode() for name in names]
    assert sorted(written, key=walk_sort_key) == ["\\a.png", "z.png", "\\udcff.png", "\ue000.png"]


@given(st.text())
def test_display_name_is_one_printable_line(text: str) -> None:
    line = display_name(text)
    assert line.isprintable()
    assert text.isprintable() <= (line == text)
    line.encode("utf-8")


@pytest.mark.parametrize(
    ("text", "line"),
    [("a\nb", r"a\nb"), ("\x1b[2Jgone", r"\x1b[2Jgone"), ("\udcff.png", r"\udcff.png"), ("é漢 .png", "é漢 .png")],
)
def test_display_name_escapes_what_is_not_printable(text: str, line: str) -> None:
    assert display_name(text) == line
