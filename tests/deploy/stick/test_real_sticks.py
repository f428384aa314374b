"""Sticks from the real registry: one installs and runs without a network, one resolves for another processor."""

from __future__ import annotations

import os
import platform
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.tags import compatible_tags, cpython_tags
from packaging.utils import canonicalize_name, parse_wheel_filename

from echoquad_deploy.stick.check import verify_stick
from echoquad_deploy.stick.errors import RegistryError, WheelhouseError
from echoquad_deploy.stick.packer import PackedStick, pack_stick
from echoquad_deploy.stick.target import Target
from echoquad_runtime._version import __version__
from echoquad_serve.config import load_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(sys.platform != "linux", reason="sticks are for Linux"),
]

MACHINES = {"EM_X86_64": 62, "EM_AARCH64": 183}


def pack(bundle: Path, out: Path, target: Target, **options: object) -> PackedStick:
    try:
        return pack_stick(bundle, out, target, **options)  # type: ignore[arg-type]
    except RegistryError:
        pytest.skip("no package index can be reached")


@pytest.fixture(scope="module")
def own_target() -> Target:
    """Return this machine as a target."""
    if platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip("no stick is for this processor")
    return Target(platform.machine())  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def real_stick(
    tiny_bundle: Path, keys: Path, own_target: Target, tmp_path_factory: pytest.TempPathFactory
) -> PackedStick:
    """Return a stick of the code that runs, for this machine. Shared: tests must not change it."""
    out = tmp_path_factory.mktemp("real") / "stick"
    return pack(tiny_bundle, out, own_target, extras=["serve", "dicom"], key=keys / "ours.pem")


def without_network(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in a network namespace that has no route, without the settings of this user's pip and Python."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
    namespace = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--net"]
    return subprocess.run(
        [*namespace, *map(str, command)],
        check=False,
        capture_output=True,
        encoding="utf-8",
        cwd=cwd,
        env={**kept, "HOME": str(cwd.parent), "PIP_CONFIG_FILE": "/dev/null", "PYTHONUTF8": "1"},
        timeout=300,
    )


@pytest.fixture(scope="module")
def installed(real_stick: PackedStick, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the ``bin`` of a fresh environment into which the stick was installed without a network."""
    if shutil.which("unshare") is None:
        pytest.skip("needs Debian's util-linux")
    home = tmp_path_factory.mktemp("box")
    reached = without_network(
        sys.executable, "-c", "import socket; socket.create_connection(('1.1.1.1', 443), 5)", cwd=home
    )
    assert "Network is unreachable" in reached.stderr
    made = without_network(sys.executable, "-m", "venv", "--without-pip", home / "venv", cwd=home)
    assert made.returncode == 0, made.stderr
    (pip,) = (real_stick.folder / "wheels").glob("pip-*.whl")  # the stick brings its own
    install = [home / "venv" / "bin" / "python", pip / "pip", "install", "--no-index", "--find-links", "wheels"]
    install += ["--require-hashes", "-r", "requirements.lock"]
    ended = without_network(*install, "--quiet", "--disable-pip-version-check", cwd=real_stick.folder)
    assert (ended.returncode, ended.stderr) == (0, "")
    return home / "venv" / "bin"


def test_stick_installs_and_decides_without_a_network(
    real_stick: PackedStick, installed: Path, keys: Path, frames_folder: Path, tmp_path: Path
) -> None:
    bundle = real_stick.folder / "bundle"
    commands: Sequence[Sequence[str | Path]] = (
        ["doctor"],
        ["verify", bundle, "--public-key", keys / "ours.pub.pem"],
        ["predict", bundle, frames_folder, "--public-key", keys / "ours.pub.pem", "--out", tmp_path / "decisions.csv"],
    )
    doctor, verified, predicted = (without_network(installed / "echoquad", *line, cwd=tmp_path) for line in commands)
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    assert "[ok] cpu: computed the expected numbers" in doctor.stdout
    assert verified.returncode == 0, verified.stderr
    assert verified.stdout.startswith(f"PASS {bundle}") and "signed by the key" in verified.stdout
    assert predicted.returncode == 0, predicted.stderr
    rows = (tmp_path / "decisions.csv").read_text().splitlines()
    assert len(rows) > 1 and rows[0].startswith("file,")
    version = without_network(installed / "echoquad", "--version", cwd=tmp_path)
    assert version.stdout == f"echoquad {__version__}\n"
    checked = without_network(installed / "python", "-m", "pip", "check", cwd=tmp_path)
    assert checked.stdout == "No broken requirements found.\n"


def test_installed_program_checks_sticks_and_packs_its_own_wheel(
    real_stick: PackedStick, installed: Path, keys: Path, tmp_path: Path
) -> None:
    """The repacked wheel has the bytes of every file of the wheel from which it was installed."""
    line = ["pack", "--check", real_stick.folder, "--public-key", keys / "ours.pub.pem"]
    checked = without_network(installed / "echoquad", *line, cwd=tmp_path)
    assert (checked.returncode, checked.stderr) == (0, "")
    code = "import sys; from pathlib import Path; from echoquad_deploy.stick.own_wheel import make_own_wheel as make"
    made = without_network(installed / "python", "-c", f"{code}; print(make(Path('out')).path)", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    original, repacked = (
        {name: archive.read(name) for name in archive.namelist() if not name.endswith("/RECORD")}
        for archive in map(
            zipfile.ZipFile,
            (
                real_stick.folder / "wheels" / f"echoquad-{__version__}-py3-none-any.whl",
                tmp_path / made.stdout.strip(),
            ),
        )
    )
    assert repacked == original


def test_pip_refuses_a_wheel_of_the_stick_with_a_changed_byte(
    real_stick: PackedStick, installed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "stick"
    shutil.copytree(real_stick.folder, folder)
    (wheel,) = (folder / "wheels").glob("starlette-*.whl")
    data = bytearray(wheel.read_bytes())
    data[len(data) // 2] ^= 1
    wheel.write_bytes(data)
    pip = [
        installed / "python",
        "-m",
        "pip",
        "install",
        "--no-index",
        "--find-links",
        "wheels",
        "--target",
        tmp_path / "t",
    ]
    ended = without_network(*pip, "--require-hashes", "-r", "requirements.lock", cwd=folder)
    assert ended.returncode == 1
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in ended.stderr


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_stick_for_aarch64_is_complete(python: str, tiny_bundle: Path, keys: Path, tmp_path: Path) -> None:
    """Hold the wheels against three independent judges: packaging's tags, their metadata, and their ELF headers."""
    target = Target("aarch64", python)
    extras = ["cpu", "dicom", "pacs", "serve", "video"]
    packed = pack(tiny_bundle, tmp_path / "stick", target, extras=extras, key=keys / "ours.pem")
    verify_stick(packed.folder, keys / "ours.pub.pem")
    paths = sorted((packed.folder / "wheels").iterdir())
    versions = {}
    version = tuple(map(int, python.split(".")))
    platforms = [*(f"manylinux_2_{minor}_aarch64" for minor in range(28, 16, -1)), "manylinux2014_aarch64"]
    allowed = {*cpython_tags(version, platforms=platforms, abis=[f"cp{python.replace('.', '')}"])}
    allowed |= {*compatible_tags(version, f"cp{python.replace('.', '')}", platforms)}
    for path in paths:
        name, wheel_version, _, tags = parse_wheel_filename(path.name)
        versions[name] = wheel_version
        assert tags & allowed, path.name
    assert {"echoquad", "numpy", "onnxruntime", "pillow", "starlette", "cryptography", "av"} <= versions.keys()
    compiled = 0
    for path in paths:
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                if ".so" in Path(member).suffixes:
                    head = archive.read(member)[:20]
                    if head[:4] == b"\x7fELF":
                        compiled += 1
                        assert struct.unpack_from("<H", head, 18)[0] == MACHINES["EM_AARCH64"], (path.name, member)
    assert compiled > 50
    environment = {"python_version": python, "python_full_version": f"{python}.5", "platform_machine": "aarch64"}
    for path in paths:
        from email import message_from_bytes

        with zipfile.ZipFile(path) as archive:
            (info,) = [
                name for name in archive.namelist() if name.endswith(".dist-info/METADATA") and name.count("/") == 1
            ]
            fields = message_from_bytes(archive.read(info))
        assert SpecifierSet(fields["Requires-Python"] or "").contains(f"{python}.5"), path.name
        for line in fields.get_all("Requires-Dist", []):
            requirement = Requirement(line)
            wanted = [""] + (extras if fields["Name"] == "echoquad" else [])
            marker = requirement.marker
            if marker is None or any(marker.evaluate({**environment, "extra": extra}) for extra in wanted):
                assert versions[canonicalize_name(requirement.name)] in requirement.specifier, (path.name, line)


def test_stick_for_aarch64_installs_with_pip_for_that_platform(tiny_bundle: Path, tmp_path: Path) -> None:
    """pip itself unpacks the lock for aarch64 from the stick alone, with every hash."""
    target = Target("aarch64")
    packed = pack(tiny_bundle, tmp_path / "stick", target)
    lock = ["--no-index", "--find-links", "wheels", "--require-hashes", "-r", "requirements.lock"]
    command = [sys.executable, "-m", "pip", "install", "--target", str(tmp_path / "box"), *lock, *target.pip_options()]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, cwd=packed.folder)
    assert ended.returncode == 0, ended.stderr
    suffix = sysconfig.get_config_var("EXT_SUFFIX").replace(platform.machine(), "aarch64")
    assert list((tmp_path / "box" / "numpy").rglob(f"*{suffix}"))


def test_package_without_a_wheel_for_aarch64_is_named_and_leaves_nothing(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(WheelhouseError, match=r"^onnxruntime-openvino>=[\d.]+: no wheel for Python 3\.11 on aarch64"):
        pack(tiny_bundle, tmp_path / "stick", Target("aarch64", "3.11"), extras=["openvino"])
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Return a folder that every user can read: pytest's own are closed to the user of the installer's checks."""
    with tempfile.TemporaryDirectory(prefix="echoquad-stick-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_installer_of_the_stick_installs_it_and_refuses_changed_copies(
    real_stick: PackedStick, keys: Path, own_target: Target, open_folder: Path
) -> None:
    """Run the real ``install.sh`` of the real stick below another root, in a namespace without a network."""
    program = f"/usr/bin/python{own_target.python}"
    for needed in ("bash", "openssl", "flock", "setpriv", program):
        if shutil.which(needed) is None:
            pytest.skip(f"needs Debian's {needed}")
    root = open_folder / "root"
    root.mkdir()
    stick = shutil.copytree(real_stick.folder, open_folder / "stick")
    command = ["bash", stick / "install.sh", "--key", keys / "ours.pub.pem", "--root", root, "--python", program]
    for name in ("README.txt", "sbom.cdx.json", "licences/README.txt", "bundle/model.fp32.onnx"):
        data = (stick / name).read_bytes()
        (stick / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        refused = without_network(*command, cwd=open_folder)
        assert refused.returncode == 3 and f"{name} was damaged or changed" in refused.stderr, refused
        (stick / name).write_bytes(data)
    assert list(root.rglob("opt")) == []
    other = without_network(*command[:3], keys / "theirs.pub.pem", *command[4:], cwd=open_folder)
    assert other.returncode == 3 and "which is not the expected one" in other.stderr
    ended = without_network(*command, cwd=open_folder)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    current = root / "opt" / "echoquad" / "current"
    assert "PASS" in ended.stdout and "signed by the key" in ended.stdout
    version = without_network(current / "venv" / "bin" / "echoquad", "--version", cwd=open_folder)
    assert version.stdout == f"echoquad {__version__}\n"
    assert load_config(root / "etc" / "echoquad" / "service.toml").model.public_key == root / "etc/echoquad/bundle.pub"
    assert (root / "etc" / "echoquad" / "bundle.pub").read_bytes() == (keys / "ours.pub.pem").read_bytes()


def test_stick_for_windows_is_complete(tiny_bundle: Path, keys: Path, tmp_path: Path) -> None:
    """Packages that only Windows needs are there, and every library is one of x86-64."""
    target = Target("win_amd64", "3.12")
    extras = ["dicom", "pacs", "serve", "video"]
    packed = pack(tiny_bundle, tmp_path / "stick", target, extras=extras, key=keys / "ours.pem")
    facts = verify_stick(packed.folder, keys / "ours.pub.pem").facts
    assert facts["target"] == "win_amd64" and "glibc" not in facts
    assert "install.ps1 -Key bundle.pub" in " ".join((packed.folder / "README.txt").read_text().split())
    config = packed.folder / "config" / "service.toml"
    assert load_config(config).store.folder == config.parent / "store"
    paths = sorted((packed.folder / "wheels").iterdir())
    assert "colorama" in {parse_wheel_filename(path.name)[0] for path in paths}  # click wants it on Windows
    compiled = 0
    for path in paths:
        assert path.stem.endswith(("-any", "-win_amd64")), path.name
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                if member.endswith((".pyd", ".dll")):
                    data = archive.read(member)
                    start = struct.unpack_from("<I", data, 0x3C)[0]
                    assert data[start : start + 4] == b"PE\0\0"
                    assert struct.unpack_from("<H", data, start + 4)[0] == 0x8664, (path.name, member)
                    compiled += 1
    assert compiled > 50
