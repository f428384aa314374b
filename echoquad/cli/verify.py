"""``echoquad verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from echoquad.cli.console import Progress, note, say, table
from echoquad.cli.declare import Option
from echoquad.cli.options import BundleFolder, Device, DeviceName, PublicKey, Threads

if TYPE_CHECKING:
    from collections.abc import Iterable

    from echoquad_runtime.errors import EchoQuadError
    from echoquad_runtime.verify.verify import DeviceCheck, Verification, VerificationReport

__all__ = ["verify"]

ALL = "all"  # of --precision


def verify(
    bundle: BundleFolder,
    device: Device = DeviceName.auto,
    precision: Annotated[
        str | None,
        Option(
            "--precision",
            metavar="NAME",
            help="Graph to run: fp32, fp16 or int8; bf16 is fp32 computed in bfloat16, on openvino "
            "alone, tf32 in TF32, on cuda alone; all is "
            "every one that the bundle holds. The bundle's default where not given.",
        ),
    ] = None,
    all_devices: Annotated[
        bool,
        Option("--all-devices", help="Every device that works here, in every precision unless --precision names one."),
    ] = False,
    threads: Threads = None,
    public_key: PublicKey = None,
    json_file: Annotated[
        Path | None,
        Option("--json", metavar="FILE", help="Also keep a record as JSON, whether it passes or fails."),
    ] = None,
) -> None:
    """Hash a bundle's files and replay its golden frames on the device at hand. Needs no torch."""
    from echoquad_runtime.devices.session_factory import usable_devices
    from echoquad_runtime.errors import OutputError, UsageError
    from echoquad_runtime.storage.atomic import write_json
    from echoquad_runtime.verify.verify import verify_all

    if all_devices and device is not DeviceName.auto:
        raise UsageError(f"--all-devices and --device {device.value}: expected one of the two; leave the other out")
    every = precision == ALL or (all_devices and precision is None)
    with Progress("verifying") as progress:
        record = verify_all(
            bundle,
            devices=usable_devices() if all_devices else {device.value: None},
            precisions=None if every else [precision],
            threads=threads,
            public_key=public_key,
            progress=progress.update,
        )
    unwritten: OutputError | None = None
    if json_file is not None:
        try:
            write_json(json_file, record.to_dict())
            note(f"wrote {json_file.as_posix()}")
        except OutputError as error:  # what was found comes first
            unwritten = error
    for line in dict.fromkeys(check.verification.provider_note for check in record.checks if check.verification):
        if line:
            note(line)
    if every or all_devices:
        _show_table(record)
    failure = _failure(record)
    if failure is not None:
        if unwritten is not None:
            note(f"the record is not written: {unwritten}")
        raise failure
    signed = f"; signed by the key {record.signed_by[:12]}..." if record.signed_by else ""
    say(f"PASS {record.bundle}: {_summary(record)}; {', '.join(_versions(record))}{signed}")
    if unwritten is not None:
        raise unwritten


def _failure(record: VerificationReport) -> EchoQuadError | None:
    """Give what the command ends with; None where all has passed."""
    from echoquad_runtime.errors import BundleError, BundleNotFoundError, VerificationError

    if record.passed:
        return None
    error = record.error
    if error is None and len(record.checks) == 1:
        error = record.checks[0].error
    if isinstance(error, BundleError) and not isinstance(error, BundleNotFoundError):
        return VerificationError(str(error))  # a bundle that is not whole has failed, whatever the fault
    if error is not None:
        return error
    failed = [check for check in record.checks if check.usable and not check.passed]
    if not failed:  # none of them could be used
        nothing = f"{record.bundle}: FAILED, no device could be used; run echoquad doctor"
        return next((check.error for check in record.checks), None) or VerificationError(nothing)
    if len(record.checks) == 1:
        return VerificationError(f"{record.bundle}: FAILED, {_outcome(record.checks[0])}")
    what = "; ".join(f"{check.precision} on {check.device}: {_outcome(check)}" for check in failed)
    return VerificationError(f"{record.bundle}: FAILED in {len(failed)} of {len(record.checks)} checks: {what}")


def _summary(record: VerificationReport) -> str:
    if len(record.checks) == 1 and (found := record.checks[0].verification) is not None:
        return f"{_figures(found)}; {found.provider}"
    tried = [check.verification for check in record.checks if check.verification is not None]
    return f"{record.files} files whole, {len(tried)} of {len(tried)} checks of {tried[0].frames} golden frames"


def _outcome(check: DeviceCheck) -> str:
    if check.verification is None:
        return str(check.error)
    allowed = ", ".join(f"{name} {value:g}" for name, value in check.verification.gate.items())
    return f"{_figures(check.verification)}; allowed: {allowed}; do not deploy it on this device"


def _figures(found: Verification) -> str:
    return (
        f"{found.files} files whole, {found.frames} golden frames on {found.device} in {found.precision}: "
        f"worst |dlogit| {found.max_abs_dlogit:.2e}, "
        f"worst |dprobability| {found.max_abs_dprobability:.2e} ({found.worst_frame}), "
        f"{_flips(found.frame_flips, found.tolerated_frame_flips)} frame flips, "
        f"{_flips(found.quadrant_flips, found.tolerated_quadrant_flips)} quadrant flips"
    )


def _flips(counted: int, tolerated: int) -> str:
    return f"{counted} (+{tolerated} within tolerance)" if tolerated else str(counted)


def _versions(record: VerificationReport) -> Iterable[str]:
    known = record.versions
    for name, words in (
        ("echoquad", f"echoquad {known['echoquad']}"),
        ("onnxruntime", known["onnxruntime"]),
        ("python", f"Python {known['python']}"),
        ("platform", known["platform"]),
    ):
        if known[name]:
            yield words


def _show_table(record: VerificationReport) -> None:
    rows = []
    for check in record.checks:
        found, verdict = check.verification, "passed" if check.passed else "FAILED" if check.usable else "not usable"
        figures = ["-"] * 4
        if found is not None:
            figures = [
                f"{found.max_abs_dlogit:.2e}",
                f"{found.max_abs_dprobability:.2e}",
                _flips(found.frame_flips, found.tolerated_frame_flips),
                _flips(found.quadrant_flips, found.tolerated_quadrant_flips),
            ]
        device, provider = (found.device, found.provider) if found is not None else (check.device, "-")
        rows.append([device, check.precision or "default", provider, *figures, verdict])
    if rows:
        figures = ["max |dlogit|", "max |dp|", "frame flips", "quadrant flips"]
        say(table(["device", "precision", "provider", *figures, "verdict"], rows))
    for name, obstacle in record.unavailable_devices.items():
        say(f"{name} is not usable: {obstacle}")
    for check in record.checks:
        if not check.usable:
            say(f"{check.precision} on {check.device} is not usable: {check.error}")
