"""``echoquad demo``."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import typer

from echoquad.cli.framework.console import format_command, print_status
from echoquad.cli.framework.extras import require_extra

__all__ = ["demo"]

MARKER = ".echoquad-demo"  # only a folder that contains this file is ever replaced

_PORT: Final = 8770
_PATIENTS, _EPOCHS = 220, 12
# The page has to be there within a minute: fewer and larger steps, and weights that are averaged over fewer of them.
_QUICK_PATIENTS, _QUICK_EPOCHS = 80, 5
_QUICK: Final = ("--set", "batch_size=32", "--set", "ema_decay=0.98")


def demo(
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder to write; an older demo is replaced.")
    ] = Path("demo"),
    patients: Annotated[
        int | None,
        typer.Option(
            "--patients",
            metavar="N",
            min=6,
            help=f"Phantom patients, two frames each. Default: {_PATIENTS}, or {_QUICK_PATIENTS} with --serve.",
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            "--epochs",
            metavar="N",
            min=1,
            help=f"Training epochs. Default: {_EPOCHS}, or {_QUICK_EPOCHS} with --serve.",
        ),
    ] = None,
    serve: Annotated[
        bool,
        typer.Option(
            "--serve",
            help="Serve the demo's bundle and open its page. A bundle that is there already is used; otherwise the "
            "demo draws, trains and exports one, and leaves the other steps out.",
        ),
    ] = False,
    port: Annotated[
        int | None,
        typer.Option(
            "--port",
            metavar="N",
            min=1,
            max=65535,
            help=f"With --serve: port of the page. Default: {_PORT}, or a free one if that is taken.",
        ),
    ] = None,
    no_open: Annotated[
        bool, typer.Option("--no-open", help="With --serve: only print the address, and open no browser.")
    ] = False,
) -> None:
    """Run every step on phantom frames: draw, train, export, verify, predict, bench. A few minutes on a CPU.

    With --serve, the page of the bedside service is open within about a minute.
    """
    begin = time.perf_counter()
    if not serve:
        _make_folder(out)
        _run_all(out, patients or _PATIENTS, epochs or _EPOCHS)
        _describe(out, time.perf_counter() - begin)
        return
    require_extra("serve")
    if patients is not None or epochs is not None or not _has_bundle(out):
        _make_folder(out)
        _make_bundle(out, patients or _QUICK_PATIENTS, epochs or _QUICK_EPOCHS, _QUICK)
    _serve(out, port or _free_port(), begin, open_page=not no_open)


def _make_folder(out: Path) -> None:
    """Make the demo's folder, in place of an older demo.

    Raises
    ------
    OutputError
        If the folder holds anything else.
    """
    from echoquad_runtime.errors import OutputError
    from echoquad_runtime.storage.atomic import make_folder, write_bytes

    require_extra("export")
    if out.exists() and not (out / MARKER).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out.as_posix()}: exists and is not an earlier demo; choose another --out")
    shutil.rmtree(out, ignore_errors=True)
    make_folder(out)
    write_bytes(out / MARKER, b"")


def _run_all(out: Path, patients: int, epochs: int) -> None:
    root = out.as_posix()
    data, run, bundle = f"{root}/data", f"{root}/run", f"{root}/bundle"
    _draw_and_train(out, patients, epochs)
    for arguments in (
        ["evaluate", run, data, "--split", "test", "--out", f"{root}/evaluation"],
        ["export", run, "--out", bundle],
        ["verify", bundle],
        ["predict", bundle, f"{data}/test", "--out", f"{root}/predictions.csv", "--overlay", f"{root}/overlays"],
        ["bench", bundle, f"{data}/test", "--json", f"{root}/bench.json"],
    ):
        _run(arguments)


def _make_bundle(out: Path, patients: int, epochs: int, recipe: Sequence[str]) -> None:
    """Take the shortest way to a bundle, which `echoquad export` checks all the same."""
    _draw_and_train(out, patients, epochs, recipe)
    _run(["export", f"{out.as_posix()}/run", "--out", f"{out.as_posix()}/bundle"])


def _draw_and_train(out: Path, patients: int, epochs: int, recipe: Sequence[str] = ()) -> None:
    data, run = f"{out.as_posix()}/data", f"{out.as_posix()}/run"
    settings = ["--recipe", "scratch", "--input-size", "64", "--epochs", str(epochs), *recipe]
    _run(["data", "phantom", data, "--patients", str(patients), "--frames", "2"])
    _run(["train", data, "--out", run, *settings])


def _describe(out: Path, seconds: float) -> None:
    root = out.as_posix()
    overlay = min((out / "overlays").rglob("*.png"), default=out / "overlays")
    print_status("")
    print_status(f"done in {seconds:.0f} s. What to look at:")
    for path, description in (
        (f"{root}/data/", "the phantoms: synthetic frames of two classes, no patient in two splits"),
        (f"{root}/run/curves.png", "the training curves; run.json and metrics.csv are beside it"),
        (f"{root}/evaluation/report.html", "every figure with its interval on one page; metrics.json is beside it"),
        (f"{root}/bundle/MODEL_CARD.md", "the model card; the folder is what a cart receives"),
        (f"{root}/predictions.csv", "one row for each frame: its decision and those of its quadrants"),
        (overlay.as_posix(), "the decisions drawn over the frame, one picture for each test frame"),
        (f"{root}/bench.json", "latency on this machine, by stage"),
    ):
        print_status(f"  {path}")
        print_status(f"      {description}")
    print_status("Phantoms are easy to classify and prove nothing about patients. Research use only.")


def _has_bundle(out: Path) -> bool:
    """Return whether an earlier demo left a bundle whose files are all intact."""
    from echoquad_runtime.bundle.bundle import Bundle
    from echoquad_runtime.errors import BundleNotFoundError, EchoQuadError

    folder = out / "bundle"
    if not (out / MARKER).is_file():
        return False
    try:
        bundle = Bundle(folder)
        for name in bundle.manifest["files"]:
            bundle.read(name)
    except BundleNotFoundError:
        return False
    except EchoQuadError as error:
        print_status(f"{error}; a new bundle is made")
        return False
    print_status(f"using {folder.as_posix()}; --patients or --epochs trains another one")
    return True


def _serve(out: Path, port: int, begin: float, *, open_page: bool) -> None:
    """Serve the bundle on loopback until a signal ends the service."""
    from echoquad_serve.config import HttpConfig, ServiceConfig, StoreConfig
    from echoquad_serve.server import run

    root = out.as_posix()
    print_status("")
    print_status(f"$ {format_command('serve', f'{root}/bundle', '--store', f'{root}/service', '--port', str(port))}")

    def show(address: str) -> None:
        print_status(f"ready after {time.perf_counter() - begin:.0f} s: {address}")
        print_status(f"Drop frames onto the page, such as those in {root}/data/test/. Ctrl-C ends the service.")
        print_status("Phantoms prove nothing about patients. Research use only, not for diagnosis.")
        if open_page:
            _open(address)

    run(out / "bundle", ServiceConfig(http=HttpConfig(port=port), store=StoreConfig(out / "service")), show)


def _free_port() -> int:
    """Return the port of the service, or if that is taken one that is not."""
    for port in (_PORT, 0):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)) as probe:
            free: int = probe.getsockname()[1]
            return free
    return _PORT


def _open(address: str) -> None:
    """Open an address in a browser with a window; do nothing where there is none."""
    # Without a display, Python would run a browser for the terminal, over the lines of the service.
    windows = sys.platform in ("win32", "darwin") or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY")))
    if windows or os.environ.get("BROWSER"):
        with contextlib.suppress(webbrowser.Error, OSError):
            webbrowser.open(address)


def _run(arguments: list[str]) -> None:
    """Print a command and run it in a process of its own, as a user would."""
    print_status("")
    print_status(f"$ {format_command(*arguments)}")
    code = subprocess.run([sys.executable, "-m", "echoquad", *arguments], check=False).returncode
    if code:
        raise typer.Exit(code)
