"""Fixtures that install the built wheel into separate environments, as a user does with ``pip install``."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OFFLINE = ("NewConnectionError", "Temporary failure in name resolution", "Failed to establish a new connection")


@dataclass(frozen=True)
class Ran:
    """A finished command: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Environment:
    """A virtual environment without pip."""

    folder: Path

    @property
    def scripts(self) -> Path:
        return self.folder / ("Scripts" if os.name == "nt" else "bin")

    @property
    def python(self) -> Path:
        return self.scripts / ("python.exe" if os.name == "nt" else "python")

    @property
    def site(self) -> Path:
        variables = {"base": str(self.folder), "platbase": str(self.folder)}
        return Path(sysconfig.get_path("purelib", "venv", variables))

    def pip(self, *arguments: str | Path) -> str:
        """Run pip on this environment; skip the test without a network."""
        command = [sys.executable, "-m", "pip", "--python", self.python, "--disable-pip-version-check", *arguments]
        ended = run([str(word) for word in command])
        if any(words in ended.out + ended.err for words in OFFLINE):
            pytest.skip("no package index can be reached")
        assert ended.code == 0, ended.out + ended.err
        return ended.out

    def echoquad(self, *arguments: str | Path, code: int = 0, env: Mapping[str, str] | None = None) -> Ran:
        """Run the installed ``echoquad``; check the exit code, and that an error is one line without traceback."""
        ended = run([str(self.scripts / "echoquad"), *map(str, arguments)], cwd=self.folder, env=env)
        assert ended.code == code, (arguments, ended)
        assert "Traceback" not in ended.out + ended.err
        errors = [line for line in ended.err.splitlines() if line.startswith("error[E_")]
        assert len(errors) == (code != 0), (arguments, ended)
        return ended

    def run_python(self, code: str) -> str:
        ended = run([str(self.python), "-c", code], cwd=self.folder)
        assert ended.code == 0, ended.err
        return ended.out


def run(command: list[str], cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Ran:
    # Isolate from the checkout: no PYTHONPATH, and not its folder as the working directory.
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    env = {**kept, "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1", **(env or {})}
    ended = subprocess.run(command, check=False, capture_output=True, cwd=cwd, env=env, encoding="utf-8", timeout=240)
    return Ran(ended.returncode, ended.stdout, ended.stderr)


def make_environment(folder: Path) -> Environment:
    if util.find_spec("pip") is None:
        pytest.skip("pip is not installed")
    ended = run([sys.executable, "-m", "venv", "--without-pip", str(folder)])
    assert ended.code == 0, ended.err
    return Environment(folder)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution and the wheel built from it."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("built")
    offline = ["--no-isolation"] if util.find_spec("hatchling") else []
    ended = run([sys.executable, "-m", "build", "--outdir", str(folder), *offline, str(ROOT)], cwd=folder)
    if any(words in ended.out + ended.err for words in OFFLINE):
        pytest.skip("no package index can be reached")
    assert ended.code == 0, ended.out + ended.err
    return folder


@pytest.fixture(scope="session")
def wheel(built: Path) -> Path:
    """The built wheel."""
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="session")
def cpu(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment after ``pip install "WHEEL[cpu]"``, as on a cart. Shared: tests must not change it."""
    environment = make_environment(tmp_path_factory.mktemp("cpu") / "venv")
    environment.pip("install", "--quiet", f"{wheel}[cpu]")
    return environment


@pytest.fixture(scope="session")
def gpu_without_driver(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with onnxruntime's GPU wheel on a machine without NVIDIA driver and CUDA libraries."""
    if sys.platform == "darwin":
        pytest.skip("macOS has no CUDA")
    try:
        ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        pass
    else:
        pytest.skip("an NVIDIA driver is installed")
    environment = make_environment(tmp_path_factory.mktemp("gpu") / "venv")
    environment.pip("install", "--quiet", "--no-compile", wheel, "onnxruntime-gpu>=1.22")
    return environment


@pytest.fixture(scope="session")
def openvino(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment after ``pip install "WHEEL[openvino]"``. Shared: tests must not change it."""
    made = sys.platform in ("linux", "win32") and platform.machine().lower() in ("x86_64", "amd64")
    if not made or sys.version_info >= (3, 14):
        pytest.skip("no wheel of onnxruntime-openvino for this machine or Python")
    environment = make_environment(tmp_path_factory.mktemp("openvino") / "venv")
    environment.pip("install", "--quiet", "--no-compile", f"{wheel}[openvino]")
    return environment


@pytest.fixture(scope="session")
def openvino_alone(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with OpenVINO's own wheel, which reports its kernels, and without EchoQuad."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("OpenVINO has other kernels on this machine")
    environment = make_environment(tmp_path_factory.mktemp("openvino-alone") / "venv")
    environment.pip("install", "--quiet", "--no-compile", "openvino")
    return environment


@pytest.fixture(scope="session")
def signing(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment after ``pip install "WHEEL[cpu,sign]"``. Shared: tests must not change it."""
    environment = make_environment(tmp_path_factory.mktemp("signing") / "venv")
    environment.pip("install", "--quiet", "--no-compile", f"{wheel}[cpu,sign]")
    return environment
