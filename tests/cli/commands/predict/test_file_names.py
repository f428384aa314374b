"""``echoquad predict`` with file names and file types that an archive may contain."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from echoquad_runtime.storage.atomic import make_folder

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems do not allow these names")


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_names_that_are_not_utf8_are_escaped(
    tiny_bundle: Path, make_frame: Any, echoquad: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    for name in (b"\xff.png", "é,\u2603.png".encode(), b'"quoted".png'):
        Image.fromarray(make_frame(1)).save(folder / os.fsdecode(name))
    (folder / os.fsdecode(b"\xfe.png")).touch()
    ran = echoquad("predict", tiny_bundle, folder, code=5)
    assert sorted(row["file"] for row in table(ran.out)) == ['"quoted".png', "\\udcff.png", "é,☃.png"]
    assert ran.errors[0].startswith("\\udcfe.png: ")


@pytest.mark.timeout(60)
def test_every_file_of_a_folder_has_a_row_or_an_error(
    tiny_bundle: Path, make_frame: Any, many: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    good = [
        *[
            "=1+1.png",
            "+1.png",
            "-1.png",
            "@a.png",
            "\ttab.png",
            "new\nline.png",
            "\r.png",
            '"quoted",.png',
            "a;=1.png",
        ],
        *["\x1b[31mred.png", "x" * 251 + ".png", "漢" * 83 + ".png", os.fsdecode(b"\xff\n.png")],
    ]
    for name in good:
        Image.fromarray(make_frame(1)).save(folder / name, "PNG")
    bad = ["\x1b[2Jclear\n.png", "pipe.png", "socket.png", "nowhere.png", "itself.png"]
    (folder / bad[0]).write_bytes(b"no image")
    os.mkfifo(folder / "pipe.png")
    monkeypatch.chdir(folder)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
    (folder / "nowhere.png").symlink_to("absent")
    (folder / "itself.png").symlink_to("itself.png")
    for name in ("loop", "again"):
        (folder / name).symlink_to(folder)
    pictures = tmp_path / "pictures"
    outs = [tmp_path / "out.csv", tmp_path / "out.jsonl"]
    line = ["predict", tiny_bundle, folder]
    found, _ = many([[*line, "--out", outs[0], "--overlay", pictures], [*line, "--out", outs[1]]])
    for ran in found:
        assert ran.code == 5
        assert len(ran.errors) == len(bad), ran.err
        assert all(text.isprintable() for text in ran.err.splitlines())
    rows = list(csv.DictReader(io.StringIO(outs[0].read_bytes().decode(), newline="")))
    lines = [json.loads(text) for text in outs[1].read_bytes().decode().split("\n")[:-1]]
    assert [(folder / name).exists() for name in (item["file"] for item in lines)] == [True] * len(good)
    assert {os.path.normpath(item["file"]) for item in lines} == set(good)
    assert [row["file"] for row in rows] == [
        item["file"].encode("utf-8", "backslashreplace").decode() for item in lines
    ]
    # No cell starts as a formula of a spreadsheet.
    assert [row["file"] for row in rows if row["file"][:1] in {*"=+-@\t\r"}] == []
    assert len(list(pictures.iterdir())) == len(good)


@pytest.mark.parametrize("part", ["d" * 199, "d"], ids=["long", "deep"])
def test_paths_of_four_thousand_characters(
    part: str, tiny_bundle: Path, make_frame: Any, echoquad: Callable[..., Any], tmp_path: Path
) -> None:
    folder, pictures = tmp_path / "frames", tmp_path / "pictures"
    folders, rest = divmod(4060 - len(os.fspath(folder)) - len("/frame.png"), len(part) + 1)
    inside = f"{part}/" * folders + "x" * rest
    try:
        make_folder((folder / f"{inside}frame.png").parent)
        Image.fromarray(make_frame(1)).save(folder / f"{inside}frame.png")
        Image.fromarray(make_frame(1)).save(folder / "frame.png")
        ran = echoquad("predict", tiny_bundle, folder, "--overlay", pictures)
        assert sorted(row["file"] for row in table(ran.out)) == sorted([f"{inside}frame.png", "frame.png"])
        # The path of the picture would be too long: it gets a short name with a hash.
        flat, deep = sorted((path.name for path in pictures.iterdir()), key=len)
        assert re.fullmatch(r"x{0,40}[frame.png]*-[0-9a-f]{16}\.overlay\.png", deep)
        assert flat == "frame.png.overlay.png"
        ran = echoquad("predict", tiny_bundle, f"{folder}/**/*frame.png", folder / f"{inside}frame.png")
        assert len(table(ran.out)) == 3
    finally:  # shutil.rmtree recurses too deeply for these folders
        subprocess.run(["rm", "-rf", folder, pictures], check=True)
