"""The dependency graph of a set of wheels, from their ``Requires-Dist``."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from echoquad_deploy.sbom.wheel import Wheel, import_packaging
from echoquad_runtime.errors import ConfigError

__all__ = ["DependencyGraph", "resolve_dependencies", "target_environment"]

_DEFAULT_ENVIRONMENT: Final[Mapping[str, str]] = {
    "implementation_name": "cpython",
    "implementation_version": "3.11.0",
    "os_name": "posix",
    "platform_machine": "x86_64",
    "platform_python_implementation": "CPython",
    "platform_release": "",
    "platform_system": "Linux",
    "platform_version": "",
    "python_full_version": "3.11.0",
    "python_version": "3.11",
    "sys_platform": "linux",
}
"""Markers are evaluated here if the set has no wheel for one platform or one Python: not on the machine at hand, so
that the document is the same wherever it is written."""

_SYSTEMS: Final[Mapping[str, Mapping[str, str]]] = {
    "win": {"os_name": "nt", "platform_system": "Windows", "sys_platform": "win32"},
    "macosx": {"os_name": "posix", "platform_system": "Darwin", "sys_platform": "darwin"},
}


@dataclass(frozen=True, slots=True)
class DependencyGraph:
    """The dependency graph of a set of wheels.

    Attributes
    ----------
    edges
        Names of the packages that each package needs, sorted, by name.
    roots
        Names of the packages that no other package of the set needs, sorted.
    missing
        Names that a package of the set needs and the set does not hold, sorted.
    """

    edges: Mapping[str, tuple[str, ...]]
    roots: tuple[str, ...]
    missing: tuple[str, ...]


def target_environment(files: Sequence[str]) -> dict[str, str]:
    """Return the environment for which wheels were chosen, as variables of environment markers.

    Parameters
    ----------
    files
        File names of the wheels. Their tags tell the Python version, the system and the processor.
    """
    utils = import_packaging("utils")
    environment = dict(_DEFAULT_ENVIRONMENT)
    for file in sorted(files):
        for tag in utils.parse_wheel_filename(file)[3]:
            digits = tag.interpreter.removeprefix("cp")
            if digits.isdigit() and tag.abi == tag.interpreter:  # abi3 wheels fit newer versions as well
                version = f"{digits[0]}.{digits[1:]}"
                environment |= {"python_version": version, "python_full_version": f"{version}.0"}
                environment["implementation_version"] = f"{version}.0"
            if tag.platform == "any":
                continue
            system = next((name for name in _SYSTEMS if tag.platform.startswith(name)), "")
            environment |= _SYSTEMS.get(system, {})
            machine = next((it for it in ("x86_64", "amd64", "aarch64", "arm64") if tag.platform.endswith(it)), "")
            if machine:
                environment["platform_machine"] = machine.upper() if system == "win" else machine
    return environment


def resolve_dependencies(
    wheels: Sequence[Wheel], environment: Mapping[str, str], extras: Collection[str] | None = None
) -> DependencyGraph:
    """Return which wheel of a set needs which.

    A requirement counts if its marker holds in the environment. An extra of a package counts if a wheel asks for it;
    of a package that nobody needs, such as EchoQuad itself, it counts if it is among `extras`.

    Parameters
    ----------
    wheels
        The set; each package once.
    environment
        Variables of environment markers, such as ``target_environment`` returns.
    extras
        Extras that were asked for. None takes those of which the set holds everything that they need.

    Raises
    ------
    ConfigError
        If a requirement cannot be parsed.
    """
    by_name = {wheel.name: wheel for wheel in wheels}
    needs = {wheel.name: _Needs(wheel, environment) for wheel in wheels}
    named = {name: {need for need, _ in needs[name].all()} - {name} for name in by_name}
    tops = set(by_name).difference(*named.values()) if named else set()
    active = {
        name: {
            extra
            for extra in by_name[name].extras
            if name in tops and (needs[name].is_held(extra, by_name) if extras is None else extra in extras)
        }
        for name in by_name
    }
    edges: dict[str, set[str]] = {}
    missing: set[str] = set()
    changed = True
    while changed:  # an extra that is found may make another one active; there are finitely many
        changed = False
        for name in by_name:
            found = dict.fromkeys([need for need, _ in needs[name].active(active[name])])
            for need, wanted in needs[name].active(active[name]):
                if need in active and not wanted <= active[need]:
                    active[need] |= wanted
                    changed = True
            edges[name] = {need for need in found if need in by_name and need != name}
            missing |= found.keys() - by_name.keys()
    roots = set(by_name).difference(*edges.values()) if edges else set()
    return DependencyGraph(
        {name: tuple(sorted(edges[name])) for name in sorted(edges)}, tuple(sorted(roots)), tuple(sorted(missing))
    )


class _Needs:
    """The requirements of one wheel in one environment."""

    def __init__(self, wheel: Wheel, environment: Mapping[str, str]) -> None:
        requirements, utils = import_packaging("requirements"), import_packaging("utils")
        self._name, self._environment, self._normalise = wheel.name, environment, utils.canonicalize_name
        try:
            self._requirements: list[Any] = [requirements.Requirement(line) for line in wheel.requirements]
        except ValueError as error:
            raise ConfigError(
                f"{wheel.file}: a requirement cannot be parsed ({' '.join(str(error).split())})"
            ) from error

    def all(self) -> Iterator[tuple[str, set[str]]]:
        """Yield name and extras of each requirement, whatever its marker."""
        for it in self._requirements:
            yield self._normalise(it.name), {self._normalise(extra) for extra in it.extras}

    def active(self, extras: set[str]) -> Iterator[tuple[str, set[str]]]:
        """Yield name and extras of the requirements whose marker holds with some extras, or without one."""
        for it, need in zip(self._requirements, self.all(), strict=True):
            if any(self._holds(it, extra) for extra in {"", *extras}):
                yield need

    def is_held(self, extra: str, held: Mapping[str, Wheel], seen: frozenset[str] = frozenset()) -> bool:
        """Return whether a set holds all that an extra needs, extras of the package itself included."""
        for it, (name, extras) in zip(self._requirements, self.all(), strict=True):
            if not self._holds(it, extra) or self._holds(it, ""):
                continue
            if name not in held:
                return False
            if name == self._name and not all(
                self.is_held(other, held, seen | {extra}) for other in extras - seen - {extra}
            ):
                return False
        return True

    def _holds(self, requirement: Any, extra: str) -> bool:
        return requirement.marker is None or bool(requirement.marker.evaluate({**self._environment, "extra": extra}))
