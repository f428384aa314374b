"""``echoquad verify``."""

from __future__ import annotations

from echoquad.cli.console import note, say
from echoquad.cli.options import BundleFolder, Device, DeviceName, Precision, Threads

__all__ = ["verify"]


def verify(
    bundle: BundleFolder,
    device: Device = DeviceName.auto,
    precision: Precision = None,
    threads: Threads = None,
) -> None:
    """Hash a bundle's files and replay its golden frames on the device at hand. Needs no torch."""
    from echoquad_runtime import verify as verification
    from echoquad_runtime.errors import BundleError, BundleNotFoundError, VerificationError

    try:
        found = verification.verify(bundle, device=device.value, precision=precision, threads=threads)
    except BundleNotFoundError:
        raise
    except BundleError as error:  # a bundle that is not whole has failed its verification, whatever the fault
        raise VerificationError(str(error)) from error
    if found.provider_note:
        note(found.provider_note)
    figures = (
        f"{found.files} files whole, {found.frames} golden frames on {found.device} in {found.precision}: "
        f"worst |dlogit| {found.max_abs_dlogit:.2e}, "
        f"worst |dprobability| {found.max_abs_dprobability:.2e} ({found.worst_frame}), "
        f"{found.frame_flips} frame flips, {found.quadrant_flips} quadrant flips"
    )
    if not found.passed:
        allowed = ", ".join(f"{name} {value:g}" for name, value in found.gate.items())
        raise VerificationError(
            f"{bundle.as_posix()}: FAILED, {figures}; allowed: {allowed}; do not deploy it on this device"
        )
    say(f"PASS {bundle.as_posix()}: {figures}")
