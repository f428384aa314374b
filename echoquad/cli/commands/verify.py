"""``echoquad verify``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from echoquad.cli.framework.console import Progress, format_table, print_result, print_status, save_json
from echoquad.cli.framework.options import BundleFolder, Device, JsonFile, PublicKey, Threads

if TYPE_CHECKING:
    from echoquad_runtime.errors import EchoQuadError
    from echoquad_runtime.verify.verify import DeviceCheck, Verification, VerificationReport

__all__ = ["verify"]

ALL = "all"  # value of --precision


def verify(
    bundle: BundleFolder,
    device: Device = "auto",
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision",
            metavar="NAME",
            help="Graph to run: fp32, fp16 or int8, or all that the bundle contains. bf16 is fp32 computed in "
            "bfloat16, on openvino only; tf32 is fp32 computed in TF32, on cuda only. Default: the default of the "
            "bundle.",
        ),
    ] = None,
    all_devices: Annotated[
        bool,
        typer.Option(
            "--all-devices", help="Verify on every device that works here, in every precision if --precision is absent."
        ),
    ] = False,
    threads: Threads = None,
    public_key: PublicKey = None,
    json_file: JsonFile = None,
) -> None:
    """Hash the files of a bundle and replay its golden frames on this machine. Needs no torch."""
    from echoquad_runtime.devices.session_factory import probe_devices
    from echoquad_runtime.errors import OutputError, UsageError
    from echoquad_runtime.verify.verify import verify_all

    if all_devices and device != "auto":
        raise UsageError(f"--all-devices with --device {device}: they exclude each other; leave one out")
    every_precision = precision == ALL or (all_devices and precision is None)
    with Progress("verifying") as progress:
        record = verify_all(
            bundle,
            devices=probe_devices() if all_devices else {device: None},
            precisions=None if every_precision else [precision],
            threads=threads,
            public_key=public_key,
            progress=progress.update,
        )
    unwritten: OutputError | None = None
    try:
        save_json(json_file, record.to_dict())
    except OutputError as error:  # the result of the verification is reported first
        unwritten = error
    for note in dict.fromkeys(check.verification.provider_note for check in record.checks if check.verification):
        if note:
            print_status(note)
    if every_precision or all_devices:
        _print_table(record)
    if (failure := _failure(record)) is not None:
        if unwritten is not None:
            print_status(f"the record is not written: {unwritten}")
        raise failure
    signed = f"; signed by the key {record.signed_by[:12]}..." if record.signed_by else ""
    print_result(f"PASS {record.bundle}: {_summary(record)}; {_versions(record)}{signed}")
    if unwritten is not None:
        raise unwritten


def _failure(record: VerificationReport) -> EchoQuadError | None:
    """Return the error that the command ends with; None if every check passed."""
    from echoquad_runtime.errors import BundleError, BundleNotFoundError, VerificationError

    if record.passed:
        return None
    error = record.error
    if error is None and len(record.checks) == 1:
        error = record.checks[0].error
    if isinstance(error, BundleError) and not isinstance(error, BundleNotFoundError):
        return VerificationError(str(error))  # a malformed bundle has failed verification: exit code 3
    if error is not None:
        return error
    failed = [check for check in record.checks if check.usable and not check.passed]
    if not failed:
        unusable = VerificationError(f"{record.bundle}: FAILED, no device could be used; run echoquad doctor")
        return next((check.error for check in record.checks), None) or unusable
    if len(record.checks) == 1:
        return VerificationError(f"{record.bundle}: FAILED, {_outcome(record.checks[0])}")
    outcomes = "; ".join(f"{check.precision} on {check.device}: {_outcome(check)}" for check in failed)
    return VerificationError(f"{record.bundle}: FAILED in {len(failed)} of {len(record.checks)} checks: {outcomes}")


def _summary(record: VerificationReport) -> str:
    if len(record.checks) == 1 and (found := record.checks[0].verification) is not None:
        return f"{_figures(found)}; {found.provider}"
    results = [check.verification for check in record.checks if check.verification is not None]
    return f"{record.files} files intact, {len(results)} of {len(results)} checks of {results[0].frames} golden frames"


def _outcome(check: DeviceCheck) -> str:
    if check.verification is None:
        return str(check.error)
    allowed = ", ".join(f"{name} {value:g}" for name, value in check.verification.gate.items())
    return f"{_figures(check.verification)}; allowed: {allowed}; do not deploy it on this device"


def _figures(found: Verification) -> str:
    return (
        f"{found.files} files intact, {found.frames} golden frames on {found.device} in {found.precision}: "
        f"worst |dlogit| {found.max_abs_dlogit:.2e}, "
        f"worst |dprobability| {found.max_abs_dprobability:.2e} ({found.worst_frame}), "
        f"{_flips(found.frame_flips, found.tolerated_frame_flips)} frame flips, "
        f"{_flips(found.quadrant_flips, found.tolerated_quadrant_flips)} quadrant flips"
    )


def _flips(count: int, tolerated: int) -> str:
    return f"{count} (+{tolerated} within tolerance)" if tolerated else str(count)


def _versions(record: VerificationReport) -> str:
    labels = {"echoquad": "echoquad ", "onnxruntime": "", "python": "Python ", "platform": ""}
    return ", ".join(f"{label}{record.versions[name]}" for name, label in labels.items() if record.versions[name])


def _print_table(record: VerificationReport) -> None:
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
        print_result(format_table(["device", "precision", "provider", *figures, "verdict"], rows))
    for name, reason in record.unavailable_devices.items():
        print_result(f"{name} is not usable: {reason}")
    for check in record.checks:
        if not check.usable:
            print_result(f"{check.precision} on {check.device} is not usable: {check.error}")
