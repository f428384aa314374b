"""``echoquad doctor``."""

from __future__ import annotations

from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from echoquad.cli.framework.console import print_result, print_status, save_json
from echoquad.cli.framework.options import Device, JsonFile

if TYPE_CHECKING:
    from echoquad_runtime.engine.diagnostics import CheckStatus, DiagnosticCheck

__all__ = ["doctor"]


def doctor(
    device: Device = "auto",
    json_file: JsonFile = None,
    report_file: Annotated[
        Path | None,
        typer.Option(
            "--report",
            metavar="FILE.zip",
            help="Write a report for support: versions, devices, configuration without names and secrets, counts of "
            "the queue, log lines, self-test. It holds no value of a patient; read it before you send it.",
        ),
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option("--bundle", metavar="BUNDLE", help="Bundle of the report. Default: that of an installed service."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", metavar="FILE", help="Configuration of the report. Default: that of an installed service."
        ),
    ] = None,
    log: Annotated[
        Path | None,
        typer.Option("--log", metavar="FILE", help="JSON log of the service, for the report. Default: the journal."),
    ] = None,
) -> None:
    """Report what works on this machine. Each device computes a small graph."""
    from echoquad_runtime.engine.diagnostics import run_diagnostics
    from echoquad_runtime.errors import DeviceUnavailableError, HostError, UsageError

    if report_file is None and (bundle or config or log):
        raise UsageError("--bundle, --config and --log are parts of a report; add --report FILE.zip")
    has_torch = util.find_spec("torch") is not None
    extra_checks = [_check_isolation, *([_check_torch] if has_torch else [])]
    report = run_diagnostics(device, extra_checks=extra_checks)
    for name, value in report.facts.items():
        print_result(f"{name}: {value}")
    print_result("")
    for check in report.checks:
        print_result(f"[{check.status}] {check.name}: {check.detail}")
    if not has_torch:
        print_result('[ok] torch: not installed; only training and export need it: pip install "echoquad[export]"')
    save_json(json_file, report.to_dict())
    if report_file is not None:
        from echoquad_deploy.support_report import write_support_report

        write_support_report(report_file, report, device=device, bundle=bundle, config=config, log=log)
        print_status(f"wrote {report_file.as_posix()}; send it to nobody before you have read every file in it")
    if failed := [check.name for check in report.checks if check.status == "failed"]:
        unavailable = report.exit_code == DeviceUnavailableError.exit_code
        raise (DeviceUnavailableError if unavailable else HostError)(
            f"failed: {', '.join(failed)}; see the report on stdout"
        )


def _check_isolation() -> DiagnosticCheck:
    """Decode a frame in a reader process, and name the limits that this system does not enforce."""
    import io

    from PIL import Image

    from echoquad_runtime.engine.diagnostics import DiagnosticCheck
    from echoquad_runtime.frames.isolation.limits import MEMORY_LIMIT, TIME_LIMIT, missing_limits
    from echoquad_runtime.frames.isolation.reader_pool import can_isolate
    from echoquad_runtime.frames.reader import decode_grey

    name = "isolation"
    if not can_isolate():
        detail = "this program has no Python interpreter for reader processes: a damaged file may end it"
        return DiagnosticCheck(name, "warning", f"{detail}; do: run EchoQuad from a Python environment")
    stream = io.BytesIO()
    Image.new("L", (4, 4), 200).save(stream, "TIFF")
    if decode_grey(stream.getvalue()).mean() != 200:
        return DiagnosticCheck(name, "failed", "a reader process returned other pixels; do: install EchoQuad again")
    detail = f"a reader process decodes; it may take {MEMORY_LIMIT >> 20} MiB and {TIME_LIMIT:g} seconds for a file"
    if missing := missing_limits():
        return DiagnosticCheck(name, "warning", f"{detail}; this system does not limit {' and '.join(missing)}")
    return DiagnosticCheck(name, "ok", detail)


def _check_torch() -> DiagnosticCheck:
    """Check the versions of torch, its CUDA devices and the mean of a matrix product."""
    import torch

    from echoquad_runtime.engine.diagnostics import DiagnosticCheck
    from echoquad_train.networks.device import autocast_dtype, choose_device

    device = choose_device("auto")
    ones = torch.ones(256, 256, device=device)
    mean = (ones @ ones).mean().item()
    status: CheckStatus = "ok" if mean == 256 else "failed"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    cuda = f"{len(names)} CUDA devices ({', '.join(names)})" if names else "no CUDA device"
    dtype = str(autocast_dtype(device) or "float32").removeprefix("torch.")
    version = f"torch {torch.__version__}, torchvision {metadata.version('torchvision')}"
    detail = f"{version}; {cuda}; trains on {device.type} in {dtype}; matmul mean {mean:g}, expected 256"
    return DiagnosticCheck("torch", status, detail)
