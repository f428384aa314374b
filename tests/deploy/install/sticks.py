"""Sticks for the tests: with a small stand-in for the package `echoquad`, so that an installation takes two seconds.

The installer treats it as any other wheel; the slow tests use the real one.
"""

from __future__ import annotations

import base64
import ensurepip
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
INSTALLERS = ROOT / "export" / "echoquad_deploy" / "install"
PYTHON = "/usr/bin/python3"
NO_NETWORK = ["unshare", "--net"] if os.geteuid() == 0 else []
"""Starts a program in a network namespace without a route."""

PROGRAM = '''
"""A stand-in for echoquad: doctor, verify, and a service that answers as echoquad's does."""
import os, socket, sys, time, tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer

VERSION, FAULTS = {version!r}, {faults!r}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(VERSION.encode())

    def log_message(self, *_):
        pass


def main():
    command = sys.argv[1]
    if command in FAULTS:
        sys.exit(f"error[E_STAND_IN]: {{command}} fails")
    if command in ("doctor", "verify"):
        print(VERSION, command, *sys.argv[2:], "as", os.getuid(), sorted(os.environ))
        for path in sys.argv[2:]:
            if not path.startswith("--"):
                os.stat(path)
    elif command == "serve":
        with open(sys.argv[sys.argv.index("--config") + 1], "rb") as file:
            port = tomllib.load(file)["http"]["port"]
        server = HTTPServer(("127.0.0.1", port), Handler)
        if address := os.environ.get("NOTIFY_SOCKET"):
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.connect(address)
                sender.send(b"READY=1")
        server.serve_forever()
    else:
        print(VERSION)
'''
# Without the watchdog, which the stand-in does not feed.
UNIT = (INSTALLERS.parent / "systemd" / "echoquad.service").read_text("utf-8").replace("WatchdogSec=30\n", "")


@dataclass(frozen=True)
class Key:
    """A key pair: PEM files, and the SHA-256 of the public key in its forms DER and PEM."""

    private: Path
    public: Path
    der_sha256: str
    pem_sha256: str


def make_key(folder: Path, name: str) -> Key:
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(private))
    openssl("pkey", "-in", str(private), "-pubout", "-out", str(public))
    der = openssl("pkey", "-pubin", "-in", str(public), "-outform", "DER")
    return Key(private, public, hashlib.sha256(der).hexdigest(), hashlib.sha256(public.read_bytes()).hexdigest())


def openssl(*arguments: str) -> bytes:
    return subprocess.run(["openssl", *arguments], check=True, capture_output=True).stdout


def make_stick(
    folder: Path,
    version: str,
    key: Key | None,
    *,
    faults: Sequence[str] = (),
    config: str = "[http]\nport = 8770\n",
    unit: str = UNIT,
    facts: Mapping[str, object] | None = None,
    pip: bool = True,
) -> Path:
    """Make a stick whose `echoquad` is the stand-in.

    Parameters
    ----------
    faults
        Commands of the stand-in that fail.
    facts
        Entries of stick.json that differ.
    pip
        Whether pip's wheel is on the stick.
    """
    for name in ("wheels", "bundle", "keys", "config", "systemd", "licences/echoquad"):
        (folder / name).mkdir(parents=True)
    wheel = make_wheel(folder / "wheels", version, PROGRAM.format(version=version, faults=tuple(faults)))
    if pip:
        shutil.copy(pip_wheel(), folder / "wheels")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    (folder / "requirements.lock").write_text(f"echoquad=={version} --hash=sha256:{digest}\n")
    (folder / "bundle" / "bundle.json").write_text("{}\n")
    (folder / "bundle" / "model.fp32.onnx").write_bytes(hashlib.sha256(version.encode()).digest() * 100)
    (folder / "licences" / "README.txt").write_text("echoquad Apache-2.0\n")
    (folder / "licences" / "echoquad" / "LICENSE of it.txt").write_text("text\n")
    (folder / "README.txt").write_text("sudo bash install.sh --key PUB.pem\n")
    (folder / "sbom.cdx.json").write_text("{}\n")
    (folder / "config" / "service.toml").write_text(config)
    (folder / "systemd" / "echoquad.service").write_text(unit)
    write_stick_json(folder, version, **(facts or {}))
    seal(folder, key)
    return folder


def write_stick_json(folder: Path, version: str, **facts: object) -> None:
    content: dict[str, object] = {
        "format": 1,
        "echoquad": version,
        "target": platform.machine(),
        "python": python_version(),
        "extras": ["cpu", "serve"],
        "bundle": "bundle",
    }
    (folder / "stick.json").write_text(json.dumps(content | facts, indent=2) + "\n")


def python_version() -> str:
    """Return the version of the system's Python, which every user can run."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    return subprocess.run([PYTHON, "-c", code], check=True, capture_output=True, encoding="utf-8").stdout.strip()


def seal(folder: Path, key: Key | None) -> None:
    """Add the installers, the key, the sums and their signature, as `echoquad pack` does."""
    for name in ("install.sh", "install.ps1"):
        if (INSTALLERS / name).exists():
            shutil.copy(INSTALLERS / name, folder)
    if key is not None:
        (folder / "keys").mkdir(exist_ok=True)
        shutil.copy(key.public, folder / "keys" / "bundle.pub")
    write_sums(folder)
    if key is not None:
        sign(folder, key)


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def write_sums(folder: Path) -> None:
    names = [name for name in files(folder) if not name.startswith("SHA256SUMS")]
    lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "SHA256SUMS").write_text("".join(lines))


def sign(folder: Path, key: Key) -> None:
    sums = folder / "SHA256SUMS"
    openssl("dgst", "-sha256", "-sign", str(key.private), "-out", f"{sums}.sig", str(sums))


def make_wheel(folder: Path, version: str, program: str) -> Path:
    info = f"echoquad-{version}.dist-info"
    content = {
        "echoquad_stand_in.py": program,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: echoquad\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": "[console_scripts]\nechoquad = echoquad_stand_in:main\n",
    }
    record = "".join(
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b'=').decode()},"
        f"{len(text.encode())}\n"
        for name, text in content.items()
    )
    path = folder / f"echoquad-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in (content | {f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}).items():
            archive.writestr(name, text)
    return path


def pack_real_stick(folder: Path, bundle: Path, key: Key, target: str) -> Path:
    """Make a stick with all real wheels, as a user does; skip the test without a registry."""
    command = [sys.executable, "-m", "echoquad", "pack", str(bundle), "--out", str(folder), "--target", target]
    ended = subprocess.run(
        [*command, "--python", "3.11", "--key", str(key.private)], check=False, capture_output=True, encoding="utf-8"
    )
    if "E_REGISTRY" in ended.stderr:
        pytest.skip("no package index can be reached")
    assert ended.returncode == 0, ended.stderr
    return folder


def pip_wheel() -> Path:
    """Return the wheel of pip that this Python brings."""
    folders = [Path(ensurepip.__file__).parent / "_bundled", Path("/usr/share/python-wheels")]
    return next(path for folder in folders for path in sorted(folder.glob("pip-*.whl")))


@dataclass(frozen=True)
class Ran:
    """A finished run of install.sh: exit code and what it printed."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Box:
    """A folder that stands for the root of a box."""

    root: Path

    @property
    def opt(self) -> Path:
        return self.root / "opt" / "echoquad"

    @property
    def etc(self) -> Path:
        return self.root / "etc" / "echoquad"

    def command(self, stick: Path | None, *options: str | Path) -> list[str]:
        script = (stick or self.opt / "current") / "install.sh"
        return [*NO_NETWORK, "bash", str(script), "--root", str(self.root), *map(str, options)]

    def run(self, stick: Path | None, *options: str | Path, code: int = 0, env: Mapping[str, str] | None = None) -> Ran:
        """Run install.sh of a stick, or the installed one; check its exit code and the form of its error."""
        ended = subprocess.run(
            self.command(stick, *options),
            check=False,
            capture_output=True,
            encoding="utf-8",
            env=os.environ | {"PIP_INDEX_URL": "http://127.0.0.1:9/"} | dict(env or {}),
            timeout=120,
        )
        assert ended.returncode == code, ended.stdout + ended.stderr
        errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == (code != 0), ended.stdout + ended.stderr
        return Ran(ended.returncode, ended.stdout, ended.stderr)

    def version(self, link: str = "current") -> str | None:
        """Return what the program behind a link answers; None if there is none."""
        program = self.opt / link / "venv" / "bin" / "echoquad"
        if not program.exists():
            return None
        return subprocess.run([program, "--version"], check=True, capture_output=True, encoding="utf-8").stdout.strip()

    def releases(self) -> list[str]:
        folder = self.opt / "releases"
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []

    def tree(self) -> list[str]:
        """Return what is in the box, with links and sizes."""
        found = []
        for path in sorted(self.root.rglob("*")):
            what = path.readlink() if path.is_symlink() else path.stat().st_size if path.is_file() else ""
            found.append(f"{path.relative_to(self.root)} {what}")
        return found

    def check_whole(self) -> str | None:
        """Check that the current version works and all of it is there, if any is installed; return the version."""
        if (version := self.version()) is not None:
            sums = ["sha256sum", "--check", "--strict", "--quiet", "installed.sha256"]
            subprocess.run(sums, cwd=self.opt / "current", check=True, capture_output=True)
            assert (self.etc / "service.toml").exists()
        return version
