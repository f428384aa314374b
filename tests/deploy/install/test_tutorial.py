"""Every command of the tutorial "a box without a network" runs: those after $ here, those after # on a fresh Debian."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .debian import build_image, debian, podman

PAGE = Path(__file__).parents[3] / "docs" / "tutorials" / "offline-box.md"


def steps() -> Iterator[tuple[str, str, list[str]]]:
    """Yield prompt, command and shown output of each command of the page, in their order."""
    for block in re.findall(r"^```console\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL):
        for part in re.split(r"^(?=[$#] )", block, flags=re.MULTILINE):
            if part:
                first, *output = part.splitlines()
                yield first[0], first[2:], output


def test_page_shows_commands_of_both_machines() -> None:
    found = list(steps())
    assert {prompt for prompt, _, _ in found} == {"$", "#"}
    assert sum("install.sh" in command for _, command, _ in found) >= 6


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("as_root")
def test_every_command_of_the_page_succeeds(open_folder: Path, tiny_bundle: Path) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("the page packs for x86_64")
    usb, tools = open_folder / "usb", open_folder / "tools"
    usb.mkdir()
    tools.mkdir()
    (tools / "echoquad").write_text(f'#!/bin/sh\nexec {sys.executable} -m echoquad "$@"\n')
    (tools / "echoquad").chmod(0o755)
    for name in ("bundle", "new-bundle"):
        shutil.copytree(tiny_bundle, usb / name)
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"}
    page, folder, code = list(steps()), "/", 0
    image = build_image(open_folder / "debian")
    try:
        with debian(image, "echoquad-tutorial", {usb: "/media/usb"}) as box:
            for number, (prompt, command, output) in enumerate(page):
                if prompt == "$":
                    ended = subprocess.run(
                        ["bash", "-c", command],
                        check=False,
                        capture_output=True,
                        encoding="utf-8",
                        cwd=usb,
                        env=environment,
                    )
                    if "E_REGISTRY" in ended.stderr:
                        pytest.skip("no package index can be reached")
                    assert ended.returncode == 0, (command, ended.stderr)
                    if (usb / "pub.pem").exists():
                        box.run("cp", "/media/usb/pub.pem", "/root/pub.pem")
                elif command.startswith("cd "):
                    folder = command[3:]
                elif command == "echo $?":
                    assert [str(code)] == output
                else:
                    asked = page[number + 1][1] == "echo $?" if number + 1 < len(page) else False
                    ran = box.run("bash", "-c", f"cd '{folder}' && {command}", code=None)
                    code = ran.code
                    assert asked or code == 0, (command, ran)
                    if output[-1:] and output[-1].startswith(("error:", "Verified")):
                        assert output[-1] in ran.out + ran.err
                    if command.endswith("install.sh --key /root/pub.pem"):
                        assert "EchoQuad" in box.get("/")
    finally:
        podman("rmi", "--force", image, code=None)
