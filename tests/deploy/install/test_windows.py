"""install.ps1 is whole for a parser of PowerShell, and runs only programs and options that the stick has.

It has not run on Windows: neither Windows nor PowerShell can be had where these tests were written.
"""

from __future__ import annotations

import shutil
import subprocess
from importlib import util

import pytest

from .sticks import INSTALLERS

SCRIPT = INSTALLERS / "install.ps1"


def test_script_parses_in_powershell() -> None:
    if (powershell := shutil.which("pwsh") or shutil.which("powershell")) is None:
        pytest.skip("PowerShell is not installed")
    program = (
        "$errors = $null; [System.Management.Automation.Language.Parser]::ParseFile"
        f"('{SCRIPT}', [ref] $null, [ref] $errors) | Out-Null; $errors; exit $errors.Count"
    )
    ended = subprocess.run([powershell, "-NoProfile", "-Command", program], check=False, capture_output=True)
    assert ended.returncode == 0, ended.stdout


def test_script_parses_in_tree_sitter() -> None:
    if util.find_spec("tree_sitter_powershell") is None:
        pytest.skip("tree-sitter-powershell is not installed")
    import tree_sitter
    import tree_sitter_powershell

    parser = tree_sitter.Parser(tree_sitter.Language(tree_sitter_powershell.language()))
    assert not parser.parse(SCRIPT.read_bytes()).root_node.has_error


def test_script_refers_to_what_the_stick_holds() -> None:
    text = SCRIPT.read_text("utf-8")
    text.encode("ascii")  # Windows PowerShell reads a file without a byte order mark in the code page of the system
    for name in ("SHA256SUMS", "keys\\bundle.pub", "stick.json", "requirements.lock", "config\\service.toml", "wheels"):
        assert name in text
    for option in ("--no-index", "--require-hashes", "--only-binary", "--isolated"):
        assert option in text
