"""The wheelhouse: pip on a folder of small wheels, for other machines and other Python versions than this one."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from packaging import tags

from echoquad_deploy.stick.errors import RegistryError, WheelhouseError
from echoquad_deploy.stick.target import Target
from echoquad_deploy.stick.wheelhouse import collect_wheels, lock_lines
from echoquad_runtime.errors import ConfigError

MINOR = sys.version_info.minor
NEWER = Target("aarch64", f"3.{MINOR + 1}")
HERE = f"3.{MINOR}"
OWN = ("cpu", "serve")


@pytest.fixture
def collect(
    make_wheel: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pip_settings: dict[str, str]
) -> Callable[..., list[str]]:
    """Return a function that collects the wheels of requirements from a registry and returns their names."""
    for name, value in {**pip_settings, "PIP_FIND_LINKS": str(tmp_path / "registry")}.items():
        monkeypatch.setenv(name, value)
    own = make_wheel(tmp_path / "own", "echoquad", extras=OWN)

    def collect(requirements: Sequence[str], target: Target = NEWER) -> list[str]:
        wheels = collect_wheels(tmp_path / "wheels", requirements, target, own)
        assert sorted(path.name for path in (tmp_path / "wheels").iterdir()) == [wheel.path.name for wheel in wheels]
        return [wheel.name for wheel in wheels]

    return collect


def test_markers_and_extras_are_those_of_the_target_and_not_of_this_python(
    collect: Callable[..., list[str]], make_wheel: Callable[..., Path], tmp_path: Path
) -> None:
    """What this Python alone needs is left out; what only the newer one needs is there, with its own requirements."""
    registry = tmp_path / "registry"
    requires = [
        f"backport; python_version <= '{HERE}'",
        f"future; python_version > '{HERE}'",
        "arm; platform_machine == 'aarch64'",
        "windows; sys_platform == 'win32'",
        f"patched; python_full_version > '3.{MINOR + 1}.2'",
        f"Lib_Two[fast.er]>=1; python_version > '{HERE}'",
    ]
    make_wheel(registry, "app", requires=requires)
    make_wheel(
        registry, "lib_two", requires=["speed; extra == 'fast-er'", "other; extra == 'slow'"], extras=["fast-er"]
    )
    make_wheel(registry, "future", requires=["deeper"])
    for name in ("backport", "arm", "windows", "deeper", "patched", "speed", "other"):
        make_wheel(registry, name)
    assert collect(["app"]) == ["app", "arm", "deeper", "future", "lib-two", "patched", "speed"]


def test_lock_has_the_hash_of_each_wheel(make_wheel: Callable[..., Path], tmp_path: Path, offline: Path) -> None:
    own = make_wheel(tmp_path, "echoquad", "2.0", requires=["numpy"], extras=OWN)
    wheels = collect_wheels(tmp_path / "wheels", ["echoquad[cpu]"], NEWER, own)
    expected = [
        f"{name}=={version} --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
        for name, version, path in (("echoquad", "2.0", own), ("numpy", "1.0", offline / "numpy-1.0-py3-none-any.whl"))
    ]
    assert lock_lines(reversed(wheels)) == expected


def test_newest_wheel_that_fits_the_target_is_taken(
    collect: Callable[..., list[str]], make_wheel: Callable[..., Path], tmp_path: Path
) -> None:
    registry, abi = tmp_path / "registry", f"cp3{MINOR + 1}"
    make_wheel(registry, "lib", "1.0", tag=f"{abi}-{abi}-manylinux_2_28_aarch64")
    make_wheel(registry, "lib", "1.1", tag=f"{abi}-{abi}-manylinux_2_31_aarch64")  # a newer glibc
    make_wheel(registry, "lib", "1.2", tag=f"{abi}-{abi}-manylinux_2_28_x86_64")
    make_wheel(registry, "lib", "1.3", tag=f"{abi}-{abi}t-manylinux_2_28_aarch64")  # free-threaded
    make_wheel(registry, "lib", "1.4", tag=f"cp3{MINOR}-cp3{MINOR}-manylinux_2_28_aarch64")
    make_wheel(registry, "lib", "1.5", tag=f"{abi}-{abi}-musllinux_1_2_aarch64")
    assert collect(["lib"]) == ["lib"]
    assert [path.name for path in (tmp_path / "wheels").iterdir()] == [
        f"lib-1.0-{abi}-{abi}-manylinux_2_28_aarch64.whl"
    ]
    collect(["lib"], Target("aarch64", NEWER.python, glibc=36))
    assert [path.name for path in (tmp_path / "wheels").iterdir()] == [
        f"lib-1.1-{abi}-{abi}-manylinux_2_31_aarch64.whl"
    ]


def test_package_without_a_wheel_for_the_target_is_named(
    collect: Callable[..., list[str]], make_wheel: Callable[..., Path], tmp_path: Path
) -> None:
    registry = tmp_path / "registry"
    make_wheel(registry, "app", requires=["lib>=1"])
    make_wheel(registry, "lib", tag="cp311-cp311-win_amd64")
    with pytest.raises(
        WheelhouseError, match=r"^lib>=1: no wheel for Python 3\.\d+ on aarch64 with glibc 2.28; "
    ) as error:
        collect(["app"])
    assert (error.value.code, error.value.exit_code) == ("E_WHEELHOUSE", 1)


@pytest.mark.slow
def test_package_that_only_the_markers_of_the_target_need_is_named_if_it_has_no_wheel(
    collect: Callable[..., list[str]], make_wheel: Callable[..., Path], tmp_path: Path
) -> None:
    make_wheel(tmp_path / "registry", "app", requires=[f"absent>=2; python_version > '{HERE}'"])
    with pytest.raises(WheelhouseError, match=r"^absent>=2: no wheel"):
        collect(["app"])


def test_versions_that_exclude_each_other_are_one_line(
    collect: Callable[..., list[str]], make_wheel: Callable[..., Path], tmp_path: Path
) -> None:
    registry = tmp_path / "registry"
    make_wheel(registry, "a", requires=["lib<2"])
    make_wheel(registry, "b", requires=["lib>=2"])
    make_wheel(registry, "lib", "1.0")
    make_wheel(registry, "lib", "2.0")
    message = (
        r"^no set of wheels for Python .* satisfies all: a 1\.0 depends on lib<2; b 1\.0 depends on lib>=2; choose"
    )
    with pytest.raises(WheelhouseError, match=message) as error:
        collect(["a", "b"])
    assert "\n" not in str(error.value)


def test_registry_that_cannot_be_reached_is_one_line(
    collect: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port, which nobody serves
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(RegistryError, match=r"^the package registry cannot be reached for app;") as error:
        collect(["app"])
    assert (error.value.code, error.value.exit_code) == ("E_REGISTRY", 1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("architecture", ["x86_64", "aarch64"])
def test_tags_of_the_target_are_those_that_packaging_computes(architecture: str) -> None:
    """Compare with the tags that `packaging` returns on such a machine."""
    options = list(Target(architecture, "3.12").pip_options())  # type: ignore[arg-type]
    platforms = {options[index + 1] for index, word in enumerate(options) if word == "--platform"}
    oldest = 5 if architecture == "x86_64" else 17
    expected = {f"manylinux_2_{minor}_{architecture}" for minor in range(oldest, 29)} | {f"linux_{architecture}"}
    legacy = {"manylinux2014"} | ({"manylinux2010", "manylinux1"} if architecture == "x86_64" else set())
    assert platforms == expected | {f"{name}_{architecture}" for name in legacy}
    computed = {tag.abi for tag in tags.cpython_tags((3, 12), ["cp312"], sorted(platforms))}
    assert computed == {"cp312", "abi3", "none"}


@pytest.mark.parametrize("python", ["3", "2.7", "3.12.1", "3.x", "", "3.012"])
def test_python_version_is_two_numbers(python: str) -> None:
    with pytest.raises(ConfigError, match="expected two numbers"):
        Target("x86_64", python)


def test_architecture_is_one_of_two() -> None:
    with pytest.raises(ConfigError, match="expected x86_64, aarch64, win_amd64"):
        Target("armv7l")  # type: ignore[arg-type]
