"""What was chosen for this host: the file that ``echoquad tune`` writes and ``echoquad predict`` reads.

One JSON file a bundle, named by its manifest's hash, in the user's configuration folder. It holds what the choice
depends on (CPU, how many of it, onnxruntime, EchoQuad) and is used only while all of that still holds. It is a
convenience, so nothing about it is ever an error to a reader: what cannot be used is ignored, and a line says why.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, cast, get_args

from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.devices.host_facts import host_facts
from echoquad_runtime.devices.session_factory import Device, probe_devices
from echoquad_runtime.errors import OutputError
from echoquad_runtime.storage.atomic import make_folder, output_errors, user_folder, write_json

__all__ = [
    "Goal",
    "Kept",
    "RunConfig",
    "SavedSettings",
    "choice_file",
    "forget",
    "keep",
    "look_up",
    "resolve_settings",
]

Goal = Literal["latency", "throughput", "power"]

_SCHEMA: Final = 1
_MOST: Final = 4096  # threads, or frames at a time: more in a file was not written by `keep`


@dataclass(frozen=True, slots=True)
class RunConfig:
    """One way to run a bundle.

    Attributes
    ----------
    device, precision
        As `OnnxEngine`; never ``auto``.
    threads
        CPU threads inside an operator, at least 1.
    spinning
        Whether they wait for work in a busy loop.
    batch_size
        Frames that go through the network at a time, at least 1.
    cuda_graphs, nhwc
        As `OnnxEngine`, on CUDA.
    """

    device: str
    precision: str
    threads: int
    spinning: bool
    batch_size: int
    cuda_graphs: bool = False
    nhwc: bool = False

    def __str__(self) -> str:
        """Give the words for a note."""
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        frames = "one frame" if self.batch_size == 1 else f"{self.batch_size} frames"
        waiting = "" if not self.can_spin else ", spinning" if self.spinning else ", not spinning"
        return f"{self.precision} on {self.device}{self.on_cuda}, {threads}{waiting}, {frames} at a time"

    @property
    def on_cuda(self) -> str:
        """The words for how CUDA runs it, each after a comma; empty for the defaults."""
        return ", NHWC" * self.nhwc + ", CUDA graphs" * self.cuda_graphs

    @property
    def can_spin(self) -> bool:
        """Whether it matters: one thread has nobody to wait for, and OpenVINO's and CUDA's own take no hint."""
        return self.device == "cpu" and self.threads > 1


@dataclass(frozen=True, slots=True)
class Kept:
    """What a file holds: the choice, what it was made for, and when (ISO 8601, UTC)."""

    choice: RunConfig
    goal: Goal
    created: str


@dataclass(frozen=True, slots=True)
class SavedSettings:
    """How a command is to run a bundle.

    Attributes
    ----------
    device, precision, threads, spinning, batch_size, cuda_graphs, nhwc
        As `Predictor`.
    note
        One line on the tuning that is used, or why one is not; empty where there is none.
    tuned
        Whether a tuning is used.
    """

    device: Device
    precision: str | None
    threads: int | None
    spinning: bool
    batch_size: int | None
    note: str
    tuned: bool
    cuda_graphs: bool = False
    nhwc: bool = False


def choice_file(bundle: Bundle) -> Path:
    """Name the file for a bundle: ``tuning/<manifest_sha256>.json`` in the configuration folder.

    That folder is ``ECHOQUAD_CONFIG_DIR``, else the platform's: ``EchoQuad`` in ``%APPDATA%`` or in
    ``~/Library/Application Support``, ``echoquad`` in ``XDG_CONFIG_HOME`` or ``~/.config``.

    Raises
    ------
    OutputError
        If there is no such folder: the user has no home.
    """
    return _config_folder() / "tuning" / f"{bundle.manifest['manifest_sha256']}.json"


def keep(
    bundle: Bundle,
    choice: RunConfig,
    *,
    goal: Goal,
    max_p99_ms: float | None = None,
    table: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Write the choice for this host and bundle, in place of an older one; gives the file.

    Raises
    ------
    OutputError
        If it cannot be written.
    """
    path = choice_file(bundle)
    make_folder(path.parent)
    content = {
        "schema": _SCHEMA,
        "bundle": bundle.manifest["manifest_sha256"],
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "goal": goal,
        "max_p99_ms": max_p99_ms,
        "choice": asdict(choice),
        "host": host_facts(),
        "table": list(table),
    }
    write_json(path, content)
    return path


def forget(bundle: Bundle) -> Path | None:
    """Remove the choice for this bundle; gives the file that went, None where there was none.

    Raises
    ------
    OutputError
        If it cannot be removed.
    """
    path = choice_file(bundle)
    with output_errors(path):
        try:
            path.unlink()
        except (FileNotFoundError, NotADirectoryError):
            return None
    return path


def look_up(bundle: Bundle) -> tuple[Kept | None, str]:
    """Give the choice that was kept for this bundle if it holds here and now; if not, one line on why.

    The line is empty where nothing was ever kept.
    """
    try:
        path = choice_file(bundle)
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, OutputError):
        return None, ""
    except OSError as error:
        why = f"it cannot be read ({error.strerror or error})"
    else:
        kept, why = _understand(text, bundle)
        if not why:
            return kept, ""
    return None, f"{path.as_posix()}: the tuning is ignored, {why}; run echoquad tune again, or with --forget"


def resolve_settings(
    bundle: Bundle,
    *,
    device: Device | None = None,
    precision: str | None = None,
    threads: int | None = None,
    batch_size: int | None = None,
    untuned: bool = False,
) -> SavedSettings:
    """Settle how to run a bundle: what is given, else what was kept for this host, else the defaults.

    A choice holds for the device and the precision that it was measured on: where another is given, none of it is
    used.

    Parameters
    ----------
    device, precision, threads, batch_size
        What the user has given; None is not given.
    untuned
        Whether to ignore what was kept.
    """
    kept, note = (None, "") if untuned else look_up(bundle)
    if kept is not None:
        choice, made = kept.choice, f"{kept.created[:10]} for {kept.goal}"
        if device in (None, choice.device) and precision in (None, choice.precision):
            used = replace(choice, threads=threads or choice.threads, batch_size=batch_size or choice.batch_size)
            given = [
                name for name, value in (("--threads", threads), ("--batch-size", batch_size)) if value is not None
            ]
            note = f"as tuned on {made}: {used}" + (f" ({' and '.join(given)} as given)" if given else "")
            return SavedSettings(
                cast("Device", used.device),
                used.precision,
                used.threads,
                used.spinning,
                used.batch_size,
                note,
                tuned=True,
                cuda_graphs=used.cuda_graphs,
                nhwc=used.nhwc,
            )
        note = f"the tuning of {made} is for {choice.precision} on {choice.device}: it is not used"
    return SavedSettings(device or "auto", precision, threads, True, batch_size, note, tuned=False)


def _parse(content: Any, bundle: Bundle) -> Kept:
    if content["schema"] != _SCHEMA:
        raise ValueError
    choice = RunConfig(**content["choice"])
    if (
        choice.device not in get_args(Device)
        or choice.device == "auto"
        or choice.precision not in bundle.precisions_on(choice.device)
        or not all(type(number) is int and 1 <= number <= _MOST for number in (choice.threads, choice.batch_size))
        or not all(type(switch) is bool for switch in (choice.spinning, choice.cuda_graphs, choice.nhwc))
        or content["goal"] not in get_args(Goal)
    ):
        raise ValueError
    datetime.fromisoformat(content["created"])
    return Kept(choice, content["goal"], content["created"])


def _understand(text: bytes, bundle: Bundle) -> tuple[Kept | None, str]:
    """Read what a file holds; words on why it is of no use here, empty where it is."""
    try:
        content = json.loads(text)
        kept = _parse(content, bundle)
        host, made_for = dict(content["host"]), content["bundle"]
    except (ValueError, TypeError, KeyError, RecursionError):  # damaged by whoever, in whatever way
        return None, "it is not what echoquad tune writes"
    if made_for != bundle.manifest["manifest_sha256"]:
        return None, "it is for another bundle"
    for name, here in host_facts().items():
        if host.get(name) != here:
            return None, f"{name} was {_shown(host.get(name))} when it was made and is {here} now"
    device = kept.choice.device
    # The CPU is always there; trying the others takes a while, and is done only when one of them was chosen.
    obstacle = None if device == "cpu" else probe_devices().get(device, "this onnxruntime is built without it")
    return kept, "" if obstacle is None else f"its device {device} cannot be used: {obstacle}"


def _shown(value: object) -> str:
    """Give a value of a file that anybody may have written, fit for a line."""
    return ascii(value).strip("'\"")[:80]


def _config_folder() -> Path:
    given = os.environ.get("ECHOQUAD_CONFIG_DIR")
    if given:
        return Path(given)
    try:
        return user_folder(
            windows=("APPDATA", "Roaming"), mac="Application Support", xdg=("XDG_CONFIG_HOME", ".config")
        )
    except RuntimeError as error:
        raise OutputError(
            f"no folder to keep the tuning in ({error}); name one in the variable ECHOQUAD_CONFIG_DIR"
        ) from error
