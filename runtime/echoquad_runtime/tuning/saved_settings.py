"""Saved settings: the file that ``echoquad tune`` writes for a bundle on this host, and ``echoquad predict`` loads.

There is one JSON file per bundle, named by the hash of its manifest, in the user's configuration folder. It records
what the settings depend on (CPU model and count, onnxruntime, EchoQuad) and is used only while all of that is
unchanged. Saved settings only make inference faster, so loading never raises: a file that cannot be used is ignored,
and a note says why.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, get_args

from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.devices.host_facts import host_facts
from echoquad_runtime.devices.session_factory import Device, probe_devices
from echoquad_runtime.errors import OutputError
from echoquad_runtime.storage.atomic import make_folder, output_errors, write_json
from echoquad_runtime.storage.regular_file import read_regular
from echoquad_runtime.storage.user_folders import user_folder

__all__ = [
    "Goal",
    "ResolvedSettings",
    "RunConfig",
    "SavedSettings",
    "delete",
    "load",
    "resolve_settings",
    "save",
    "settings_file",
]

Goal = Literal["latency", "throughput", "power"]

_SCHEMA: Final = 1
_MAX_BYTES: Final = 1 << 24  # of a settings file; more is cut, and then no JSON
_MAX_COUNT: Final = 4096  # of threads, and of frames in a batch: `save` never writes more


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
        Whether idle threads wait in a busy loop.
    batch_size
        Frames per batch, at least 1.
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
        """Return the configuration in words."""
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        frames = "one frame" if self.batch_size == 1 else f"{self.batch_size} frames"
        spinning = "" if not self.can_spin else ", spinning" if self.spinning else ", not spinning"
        return f"{self.precision} on {self.device}{self.cuda_options}, {threads}{spinning}, {frames} at a time"

    @property
    def cuda_options(self) -> str:
        """The CUDA options in words, each after a comma; empty for the defaults."""
        return ", NHWC" * self.nhwc + ", CUDA graphs" * self.cuda_graphs

    @property
    def can_spin(self) -> bool:
        """Whether `spinning` has an effect: not with one thread, nor on OpenVINO or CUDA, which ignore it."""
        return self.device == "cpu" and self.threads > 1


@dataclass(frozen=True, slots=True)
class SavedSettings:
    """The content of a settings file: the chosen configuration, its goal, and when it was chosen (ISO 8601, UTC)."""

    config: RunConfig
    goal: Goal
    created: str


@dataclass(frozen=True, slots=True)
class ResolvedSettings:
    """The settings with which a command runs a bundle.

    Attributes
    ----------
    device, precision, threads, spinning, batch_size, cuda_graphs, nhwc
        As `Predictor`.
    note
        One line that names the saved settings in use, or says why they are ignored; empty if there are none.
    tuned
        Whether saved settings are in use.
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


def settings_file(bundle: Bundle) -> Path:
    """Return the settings file of a bundle: ``tuning/<manifest_sha256>.json`` in the configuration folder.

    The folder is ``ECHOQUAD_CONFIG_DIR`` if set, else that of the platform: ``EchoQuad`` in ``%APPDATA%`` or in
    ``~/Library/Application Support``, ``echoquad`` in ``XDG_CONFIG_HOME`` or ``~/.config``.

    Raises
    ------
    OutputError
        If the user has no home folder.
    """
    given = os.environ.get("ECHOQUAD_CONFIG_DIR")
    try:
        folder = (
            Path(given)
            if given
            else user_folder(
                windows=("APPDATA", "Roaming"), mac="Application Support", xdg=("XDG_CONFIG_HOME", ".config")
            )
        )
    except RuntimeError as error:
        raise OutputError(
            f"there is no configuration folder for the settings ({error}); set ECHOQUAD_CONFIG_DIR to a folder"
        ) from error
    return folder / "tuning" / f"{bundle.manifest['manifest_sha256']}.json"


def save(
    bundle: Bundle,
    config: RunConfig,
    *,
    goal: Goal,
    max_p99_ms: float | None = None,
    table: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Save the settings for this host and bundle, replacing older ones, and return the file.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    path = settings_file(bundle)
    make_folder(path.parent)
    content = {
        "schema": _SCHEMA,
        "bundle": bundle.manifest["manifest_sha256"],
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "goal": goal,
        "max_p99_ms": max_p99_ms,
        "choice": asdict(config),
        "host": host_facts(),
        "table": list(table),
    }
    write_json(path, content)
    return path


def delete(bundle: Bundle) -> Path | None:
    """Delete the settings of a bundle and return the deleted file; None if there was none.

    Raises
    ------
    OutputError
        If the file cannot be deleted.
    """
    path = settings_file(bundle)
    with output_errors(path):
        try:
            path.unlink()
        except (FileNotFoundError, NotADirectoryError):
            return None
    return path


def load(bundle: Bundle) -> tuple[SavedSettings | None, str]:
    """Return the saved settings of a bundle if they are valid on this host, else None and one line on why not.

    The line is empty if nothing was saved.
    """
    try:
        path = settings_file(bundle)
        data = read_regular(path, _MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError, OutputError):
        return None, ""
    except OSError as error:
        reason = f"the file cannot be read ({error.strerror or error})"
    else:
        saved, reason = _check(data, bundle)
        if not reason:
            return saved, ""
    return None, f"{path.as_posix()}: saved settings are ignored, {reason}; run echoquad tune again, or with --forget"


def resolve_settings(
    bundle: Bundle,
    *,
    device: Device | None = None,
    precision: str | None = None,
    threads: int | None = None,
    batch_size: int | None = None,
    untuned: bool = False,
) -> ResolvedSettings:
    """Resolve the settings to run a bundle with: given values first, then saved settings, then defaults.

    Saved settings are valid for the device and the precision that they were measured on. If another one is given,
    none of them is used.

    Parameters
    ----------
    device, precision, threads, batch_size
        Values that the user gives; None is not given.
    untuned
        Whether to ignore saved settings.
    """
    saved, note = (None, "") if untuned else load(bundle)
    if saved is not None:
        config, origin = saved.config, f"{saved.created[:10]} for {saved.goal}"
        if device in (None, config.device) and precision in (None, config.precision):
            used = replace(config, threads=threads or config.threads, batch_size=batch_size or config.batch_size)
            given = [
                name for name, value in (("--threads", threads), ("--batch-size", batch_size)) if value is not None
            ]
            note = f"as tuned on {origin}: {used}" + (f" ({' and '.join(given)} as given)" if given else "")
            return ResolvedSettings(**asdict(used), note=note, tuned=True)
        note = f"the settings tuned on {origin} are for {config.precision} on {config.device}; they are not used"
    return ResolvedSettings(device or "auto", precision, threads, True, batch_size, note, tuned=False)


def _check(data: bytes, bundle: Bundle) -> tuple[SavedSettings | None, str]:
    """Parse a settings file; return the reason if it is not valid here, else an empty one."""
    try:
        content = json.loads(data)
        saved = _parse(content, bundle)
        host, manifest_sha256 = dict(content["host"]), content["bundle"]
    except (ValueError, TypeError, KeyError, RecursionError):  # any damage
        return None, "echoquad tune did not write this file"
    if manifest_sha256 != bundle.manifest["manifest_sha256"]:
        return None, "the file is for another bundle"
    for name, current in host_facts().items():
        if host.get(name) != current:
            saved_value = ascii(host.get(name)).strip("'\"")[:80]  # anybody may have written the file
            return None, f"{name} was {saved_value} at the time and is {current} now"
    device = saved.config.device
    # The CPU is always usable. Probing other devices takes a while, so only a saved device is probed.
    reason = None if device == "cpu" else probe_devices().get(device, "this onnxruntime is built without it")
    return saved, "" if reason is None else f"device {device} cannot be used: {reason}"


def _parse(content: Any, bundle: Bundle) -> SavedSettings:
    if content["schema"] != _SCHEMA:
        raise ValueError
    config = RunConfig(**content["choice"])
    if (
        config.device not in get_args(Device)
        or config.device == "auto"
        or config.precision not in bundle.precisions_on(config.device)
        or not all(type(number) is int and 1 <= number <= _MAX_COUNT for number in (config.threads, config.batch_size))
        or not all(type(switch) is bool for switch in (config.spinning, config.cuda_graphs, config.nhwc))
        or content["goal"] not in get_args(Goal)
    ):
        raise ValueError
    datetime.fromisoformat(content["created"])
    return SavedSettings(config, content["goal"], content["created"])
