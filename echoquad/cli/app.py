"""The application: its commands, and the one place where errors become exit codes."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Final

import typer

from echoquad.cli import bench, data, demo, doctor, evaluate, export, predict, train, verify
from echoquad.cli.console import fail
from echoquad_runtime._version import __version__
from echoquad_runtime.errors import EchoQuadError, MissingExtraError

__all__ = ["app", "main"]

EXTRAS: Final = {
    **dict.fromkeys(("torch", "torchvision", "safetensors", "sklearn", "matplotlib"), "train"),
    **dict.fromkeys(("onnx", "onnxscript"), "export"),
}
"""Which extra brings a module that a command found missing."""

INTERRUPTED: Final = 130  # 128 + SIGINT, as shells have it

app = typer.Typer(
    name="echoquad",
    help="From labelled echo frames to a checked ONNX bundle that a bedside cart can run. Research use only.",
    epilog="Exit codes: 0 done; 1 bad input, model or configuration; 2 usage; 3 parity or verification failed; "
    "4 the device asked for is not there; 5 done, but some inputs failed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(train.train)
app.command()(evaluate.evaluate)
app.command()(export.export)
app.command()(verify.verify)
app.command()(predict.predict)
app.command()(bench.bench)
app.command()(doctor.doctor)
app.add_typer(data.app, name="data")
app.command()(demo.demo)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"echoquad {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop."),
    ] = False,
) -> None:
    """Hold what stands before the command."""


def main() -> None:
    """Run the command line; an error becomes one line on stderr and an exit code, never a traceback.

    ``ECHOQUAD_TRACEBACK=1`` shows the traceback of what is not supposed to happen.
    """
    try:
        app()
    except EchoQuadError as error:
        sys.exit(fail(error))
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            _unexpected(error)
        sys.exit(
            fail(
                MissingExtraError(
                    f'this needs {error.name}, which is not installed; do: pip install "echoquad[{extra}]"'
                )
            )
        )
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # The reader has what it wanted. What is still buffered has nowhere to go, and Python would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        _unexpected(error)


def _unexpected(error: Exception) -> None:
    if os.environ.get("ECHOQUAD_TRACEBACK"):
        raise error
    what = " ".join(f"{type(error).__name__}: {error}".split())
    message = (
        f"unexpected {what}; this is a fault in EchoQuad: please report it with the output of ECHOQUAD_TRACEBACK=1"
    )
    sys.exit(fail(EchoQuadError(message)))
