"""The application: its commands, and the one place where errors become exit codes."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Final

import typer

from echoquad.cli import bench, data, demo, doctor, evaluate, export, inspect, predict, sign, train, tune, verify
from echoquad.cli.console import fail, note, say
from echoquad.cli.extras import EXTRAS, missing_extra
from echoquad_runtime._version import __version__
from echoquad_runtime.errors import EchoQuadError, UsageError

__all__ = ["app", "main"]

INTERRUPTED: Final = 130  # 128 + SIGINT, as shells have it

# Typer carries a click of its own, under a private name: its classes are reached through the one that it exports.
_CommandLineError: Final[type[Exception]] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    name="echoquad",
    help="From labelled echo frames to a checked ONNX bundle that a bedside cart can run. Research use only.",
    epilog="Exit codes: 0 done; 1 bad input, model or configuration; 2 usage; 3 parity or verification failed; "
    "4 the device asked for is not there; 5 done, but some inputs failed.",
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command(epilog="Example: echoquad train data/ --out run --recipe scratch --set lr=5e-4")(train.train)
app.command(epilog="Example: echoquad evaluate run data/ --split test --out evaluation")(evaluate.evaluate)
app.command(epilog="Example: echoquad export run --out bundle")(export.export)
app.command(epilog="Example: echoquad sign bundle --key key.pem")(sign.sign)
app.command(epilog="Example: echoquad verify bundle --all-devices --json record.json")(verify.verify)
app.command(epilog="Example: echoquad inspect bundle")(inspect.inspect)
app.command(epilog="Example: echoquad predict bundle exam/ --out decisions.csv --overlay pictures")(predict.predict)
app.command(epilog="Example: echoquad bench bundle exam/ --json bench.json")(bench.bench)
app.command(epilog="Example: echoquad tune bundle exam/ --goal latency --max-p99-ms 40")(tune.tune)
app.command(epilog="Example: echoquad doctor --device cuda")(doctor.doctor)
app.command(epilog="Example: echoquad demo --out demo")(demo.demo)
app.add_typer(data.app, name="data")


def _print_version(wanted: bool) -> None:
    if wanted:
        say(f"echoquad {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop."),
    ] = False,
) -> None:
    """Show the help where no command is given."""
    if context.invoked_subcommand is None:
        context.get_help()  # Typer prints it
        raise typer.Exit(UsageError.exit_code)


def main() -> None:
    """Run the command line; an error becomes one line on stderr and an exit code, never a traceback.

    ``ECHOQUAD_TRACEBACK=1`` shows the traceback of what is not supposed to happen.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell; else the next file that is opened would get its number
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
    warnings.filterwarnings("ignore", module="PIL")  # what is wrong with a frame is told by its own line
    code = _run()
    try:
        sys.stdout.flush()
    except OSError:
        # What is still buffered has nowhere to go, and Python would complain of it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = code or 1
    sys.exit(code)


def _run() -> int:
    try:
        code = int(app(prog_name="echoquad", standalone_mode=False) or 0)
        return _interrupted() if code == INTERRUPTED else code  # Typer gives the code without a word
    except SystemExit:  # how Typer ends when the reader of a pipe has gone
        return 1
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except EchoQuadError as error:
        return fail(error)
    except Exception as error:
        return _misused(error) if isinstance(error, _CommandLineError) else _unexpected(error)


def _interrupted() -> int:
    note("interrupted")
    return INTERRUPTED


def _unexpected(error: Exception) -> int:
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        if package in EXTRAS:
            return fail(missing_extra(package, EXTRAS[package]))
    if os.environ.get("ECHOQUAD_TRACEBACK"):
        raise error
    what = " ".join(f"{type(error).__name__}: {error}".split())
    note(
        f"error: unexpected {what}; this is a fault in EchoQuad: please report it with the output of "
        "ECHOQUAD_TRACEBACK=1"
    )
    return EchoQuadError.exit_code


def _misused(error: Exception) -> int:
    """Say what is wrong with the options, in one line."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "echoquad"
    text = getattr(error, "format_message", error.__str__)().rstrip(".")
    return fail(UsageError(f"{text}; see: {command} --help"))
