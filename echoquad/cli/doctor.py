"""``echoquad doctor``."""

from __future__ import annotations

from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from echoquad.cli.console import note, say
from echoquad.cli.declare import Option
from echoquad.cli.options import Device, DeviceName

if TYPE_CHECKING:
    from echoquad_runtime.engine.diagnostics import CheckStatus, DiagnosticCheck

__all__ = ["doctor"]


def doctor(
    device: Device = DeviceName.auto,
    json_file: Annotated[Path | None, Option("--json", metavar="FILE", help="Also write the report as JSON.")] = None,
) -> None:
    """Say what works on this machine; every device is made to compute."""
    from echoquad_runtime.engine.diagnostics import run_diagnostics
    from echoquad_runtime.storage.atomic import write_json

    report = run_diagnostics(device.value, extra_checks=[_check_torch] if util.find_spec("torch") else [])
    for name, value in report.facts.items():
        say(f"{name}: {value}")
    say("")
    for check in report.checks:
        say(f"[{check.status}] {check.name}: {check.detail}")
    if not util.find_spec("torch"):
        say('[ok] torch: not installed; only training and export need it: pip install "echoquad[export]"')
    if json_file is not None:
        write_json(json_file, report.to_dict())
        note(f"wrote {json_file.as_posix()}")
    if failed := [check.name for check in report.checks if check.status == "failed"]:
        note(f"error: failed: {', '.join(failed)}; see the lines above")
    raise SystemExit(report.exit_code)


def _check_torch() -> DiagnosticCheck:
    """Do what the document's check_gpu did: version, CUDA, devices, and the mean of a matrix product."""
    import torch

    from echoquad_runtime.engine.diagnostics import DiagnosticCheck
    from echoquad_train.networks.device import autocast_dtype, choose_device

    where = choose_device("auto")
    ones = torch.ones(256, 256, device=where)
    mean = (ones @ ones).mean().item()
    status: CheckStatus = "ok" if mean == 256 else "failed"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    cuda = f"{len(names)} CUDA devices ({', '.join(names)})" if names else "no CUDA device"
    mixed = str(autocast_dtype(where) or "float32").removeprefix("torch.")
    version = f"torch {torch.__version__}, torchvision {metadata.version('torchvision')}"
    return DiagnosticCheck(
        "torch",
        status,
        f"{version}; {cuda}; trains on {where.type} in {mixed}; matmul mean {mean:g}, expected 256",
    )
