from __future__ import annotations

import os
from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echoquad_runtime.storage.row_names import digest, display_name, encoded, printed, walk_order, without_formula

FORMULAS = ["=1+1.png", "+a.png", "-a.png", "@SUM(A1).png", "\ta.png", "\ra.png", "\na.png", " =a.png", "\uff1da.png"]
PLAIN = ["a.png", "a=b.png", "a/=b.png", "./a.png", "0.png", "", ".png", " a.png", "'=a.png", "é.png", "#a.png"]

# Any name that a disk may have: no null character, parts that are not empty, "." or "..".
part = st.text(st.characters(exclude_characters="\0/"), min_size=1).filter(lambda text: text not in (".", ".."))
path = st.lists(part, min_size=1, max_size=4).map("/".join)


@pytest.mark.parametrize("name", FORMULAS)
def test_what_a_spreadsheet_would_run_is_the_same_path_and_no_formula(name: str) -> None:
    assert printed(name) == f"./{name}"
    assert PurePosixPath(printed(name)) == PurePosixPath(name)
    assert without_formula(name) == f"'{name}"


@pytest.mark.parametrize("name", PLAIN)
def test_what_it_would_not_run_stays_as_it_is(name: str) -> None:
    assert printed(name) == without_formula(name) == name


@given(path)
def test_a_printed_name_is_the_same_path_and_begins_no_formula(name: str) -> None:
    assert PurePosixPath(printed(name)) == PurePosixPath(name)
    assert printed(name).lstrip()[:1] not in {*"=+-@"}
    assert printed(name)[:1] not in {*"\t\r\n"}
    assert printed(printed(name)) == printed(name)


@given(path, path)
def test_names_differ_where_paths_do(one: str, other: str) -> None:
    assert (digest(printed(one)) == digest(printed(other))) == (one == other)


def test_a_digest_is_the_same_everywhere() -> None:
    # Shards of one archive are computed on several machines, and by several releases.
    assert digest("a/1.png").hex() == "4c9297bc24f32c0fa008ef8b092077de"
    assert digest("a\udcff.png") == digest("a\\udcff.png")  # as it is read back from a row


@given(st.lists(path, max_size=8))
def test_the_order_of_a_walk_compares_folder_by_folder(names: list[str]) -> None:
    assert sorted(names, key=lambda name: walk_order(printed(name))) == sorted(names, key=lambda name: name.split("/"))


def test_the_order_of_a_walk_where_bytes_are_no_text() -> None:
    names = ["z.png", "\ue000.png", os.fsdecode(b"\xff.png") if os.name != "nt" else "\udcff.png", "\\a.png"]
    written = [encoded(printed(name)).decode() for name in names]
    assert sorted(written, key=walk_order) == ["\\a.png", "z.png", "\\udcff.png", "\ue000.png"]


@given(st.text())
def test_what_is_shown_is_one_printable_line(text: str) -> None:
    line = display_name(text)
    assert line.isprintable()
    assert text.isprintable() <= (line == text)
    line.encode("utf-8")


@pytest.mark.parametrize(
    ("text", "line"),
    [("a\nb", r"a\nb"), ("\x1b[2Jgone", r"\x1b[2Jgone"), ("\udcff.png", r"\udcff.png"), ("é漢 .png", "é漢 .png")],
)
def test_what_cannot_be_shown_is_an_escape(text: str, line: str) -> None:
    assert display_name(text) == line
