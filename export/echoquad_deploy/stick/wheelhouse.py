"""The wheelhouse: every wheel that a set of requirements needs on the target, and a lock with their hashes.

pip chooses wheels by the tags of the target, but evaluates environment markers, such as ``python_version < "3.12"``,
for the machine on which it runs. Therefore its answer is checked: from the requirements, the metadata of the wheels are
followed with the markers of the target. What is missing is asked for by name, and what nothing needs is removed.
"""

from __future__ import annotations

import importlib.util
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from echoquad_deploy.stick.errors import RegistryError, WheelhouseError
from echoquad_deploy.stick.target import Target
from echoquad_deploy.stick.wheel_file import WheelFile, canonical_name
from echoquad_runtime.errors import MissingExtraError, OutputError
from echoquad_runtime.storage.atomic import make_folder

__all__ = ["check_tools", "collect_wheels", "find_missing", "lock_lines", "run_pip"]

_logger = logging.getLogger(__name__)

_MAX_ROUNDS: Final = 6
_MAX_NEEDS: Final = 4  # named of those that exclude each other
_OFFLINE: Final = re.compile(
    r"NewConnectionError|ConnectTimeout|ReadTimeout|connection broken by|name resolution|Max retries exceeded|"
    r"ProxyError|SSLError|CERTIFICATE_VERIFY_FAILED|Network is unreachable|Connection (refused|reset|aborted)"
)


def check_tools() -> None:
    """Check that the packages which pack a stick are installed.

    Raises
    ------
    MissingExtraError
        If one of them is not.
    """
    for name in ("packaging", "pip"):
        if importlib.util.find_spec(name) is None:
            raise MissingExtraError(f'a stick needs {name}, which is not installed; do: pip install "echoquad[deploy]"')


def collect_wheels(folder: Path, requirements: Sequence[str], target: Target, own: Path) -> list[WheelFile]:
    """Download the wheels of requirements and of all that they need into a folder.

    Parameters
    ----------
    folder
        The folder; its content is replaced.
    requirements
        Requirements by name, such as ``echoquad[cpu,serve]``.
    target
        The machine that the wheels are for.
    own
        EchoQuad's own wheel, which takes part and is copied into the folder.

    Returns
    -------
    list of WheelFile
        The wheels in `folder`, sorted by name. Each name is there once, and all that it requires.

    Raises
    ------
    RegistryError
        If the package registry cannot be reached.
    WheelhouseError
        If a package has no wheel for the target, or versions exclude each other.
    OutputError
        If the disk is full.
    """
    own_name = WheelFile(own).name
    asked = list(requirements)
    for _ in range(_MAX_ROUNDS):
        shutil.rmtree(folder, ignore_errors=True)
        make_folder(folder)
        _download(folder, [_locate(line, own_name, own) for line in asked], target)
        wheels = _index(folder)
        missing, needed = find_missing(requirements, wheels, target)
        if not missing:
            for name in wheels.keys() - needed:
                _logger.info("%s is left out: the target does not need it", wheels[name].path.name)
                wheels[name].path.unlink()
            return [wheels[name] for name in sorted(needed)]
        new = [line for line in sorted(missing) if line not in asked]
        if not new:
            break
        asked += new
    raise WheelhouseError(
        f"{', '.join(sorted(missing))}: needed on Python {target.python} for {target.architecture}, but pip does not "
        "download it; pack with the Python version of the target"
    )


def _locate(requirement: str, own_name: str, own: Path) -> str:
    """Return a requirement with the address of EchoQuad's own wheel, if it names EchoQuad."""
    name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
    if canonical_name(name) != own_name:
        return requirement
    return f"{re.split(r'[<>=!~; ]', requirement, maxsplit=1)[0]} @ {own.resolve().as_uri()}"


def _index(folder: Path) -> dict[str, WheelFile]:
    """Return the wheels in a folder by name."""
    wheels: dict[str, WheelFile] = {}
    for path in sorted(folder.iterdir()):
        wheel = WheelFile(path)
        if wheel.name in wheels:
            raise WheelhouseError(f"{wheel.name}: found {wheels[wheel.name].path.name} and {path.name}, expected one")
        wheels[wheel.name] = wheel
    return wheels


def find_missing(
    requirements: Iterable[str], wheels: Mapping[str, WheelFile], target: Target
) -> tuple[set[str], set[str]]:
    """Follow requirements through the metadata of wheels, with the markers of the target.

    Parameters
    ----------
    requirements
        Requirements to begin with.
    wheels
        Wheels by normalized name.
    target
        The machine on which they install.

    Returns
    -------
    tuple of (set of str, set of str)
        The requirements, without markers, that no wheel satisfies; and the names of the wheels that are needed.

    Raises
    ------
    WheelhouseError
        If a wheel has an invalid requirement.
    """
    from packaging.requirements import InvalidRequirement, Requirement

    environments = list(target.marker_environments())
    waiting, seen, missing, needed = list(requirements), set[tuple[str, str]](), set[str](), set[str]()
    while waiting:
        try:
            requirement = Requirement(waiting.pop())
        except InvalidRequirement as error:
            raise WheelhouseError(f"a requirement cannot be read: {error}") from error
        name = canonical_name(requirement.name)
        wheel = wheels.get(name)
        if wheel is None or not requirement.specifier.contains(wheel.version, prereleases=True):
            extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
            missing.add(f"{requirement.name}{extras}{requirement.specifier}")
            continue
        needed.add(name)
        for extra in {"", *map(canonical_name, requirement.extras)}:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            for line in wheel.requirements:
                marker = Requirement(line).marker
                if marker is None or any(marker.evaluate({**one, "extra": extra}) for one in environments):
                    waiting.append(line.partition(";")[0])
    return missing, needed


def lock_lines(wheels: Iterable[WheelFile]) -> list[str]:
    """Return the lines of ``requirements.lock``: name, version and SHA-256 of each wheel, sorted by name."""
    return sorted(f"{wheel.name}=={wheel.version} --hash=sha256:{wheel.sha256}" for wheel in wheels)


def _download(folder: Path, requirements: Sequence[str], target: Target) -> None:
    options = ["download", "--dest", str(folder), *target.pip_options()]
    run_pip([*options, *requirements], target.label)


def run_pip(arguments: Sequence[str], label: str) -> None:
    """Run pip, with the user's own configuration: registry, proxy, certificates.

    Parameters
    ----------
    arguments
        Command and options.
    label
        What the wheels are for, for the error message.

    Raises
    ------
    RegistryError
        If the package registry cannot be reached.
    WheelhouseError
        If pip finds no wheel, or fails otherwise.
    OutputError
        If the disk is full.
    """
    options = ["--progress-bar", "off", "--disable-pip-version-check", "--no-input", "--no-color"]
    command = [sys.executable, "-m", "pip", *arguments[:1], *options, *arguments[1:]]
    ended = subprocess.run(
        command, check=False, capture_output=True, encoding="utf-8", errors="replace", stdin=subprocess.DEVNULL
    )
    if ended.returncode == 0:
        return
    text = ended.stdout + ended.stderr
    if "No space left" in text or "not enough space" in text:
        raise OutputError("the wheels cannot be written: the disk is full; free space, or set TMPDIR to another disk")
    wanted = re.search(r"No matching distribution found for (.+)", text)
    if _OFFLINE.search(text):
        raise RegistryError(
            f"the package registry cannot be reached{f' for {_name(wanted[1])}' if wanted else ''}; expected a "
            "network, or a mirror in pip's configuration (pip config set global.index-url URL)"
        )
    if wanted:
        raise WheelhouseError(
            f"{_name(wanted[1])}: no wheel for {label}; choose another --python, other --extras or a newer --glibc"
        )
    if conflict := re.search(r"The conflict is caused by:\n((?: +.*\n)+)", text):
        needs = list(dict.fromkeys(" ".join(line.split()) for line in conflict[1].splitlines()))
        more = "; ..." if len(needs) > _MAX_NEEDS else ""
        raise WheelhouseError(
            f"no set of wheels for {label} satisfies all: {'; '.join(needs[:_MAX_NEEDS])}{more}; choose other "
            "--extras or another --python"
        )
    lines = [line.partition("ERROR: ")[2] for line in text.splitlines() if line.startswith("ERROR: ")]
    reason = " ".join((lines or text.strip().splitlines()[-1:] or ["no message"])[0].split())
    raise WheelhouseError(f"pip cannot get the wheels for {label}: {reason[:300]}")


def _name(requirement: str) -> str:
    """Return a requirement as pip names it, without its marker and without what wants it."""
    return requirement.partition(" (from")[0].partition(";")[0].strip()
