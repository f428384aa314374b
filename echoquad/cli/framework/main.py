"""The entry point: build the Typer application, run a command, turn errors into exit codes."""

from __future__ import annotations

import importlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from echoquad.cli.framework import signals
from echoquad.cli.framework.console import log_to_stderr, print_error, print_result, print_status
from echoquad_runtime._version import __version__
from echoquad_runtime.errors import EchoQuadError, InputNotFoundError, UsageError

__all__ = ["COMMANDS", "load_command", "main"]

COMMANDS: Final = {
    "train": "train data/ --out run --recipe scratch --set lr=5e-4",
    "ensemble": "ensemble run-1 run-2 run-3 --out ensemble --vote soft --flip",
    "evaluate": "evaluate run data/ --split test --out evaluation",
    "export": "export run --out bundle",
    "sign": "sign bundle --key key.pem",
    "verify": "verify bundle --all-devices --json record.json",
    "inspect": "inspect bundle",
    "predict": "predict bundle exam/ --out decisions.csv --overlay pictures",
    "merge": "merge part1.csv part2.csv part3.csv --out decisions.csv",
    "bench": "bench bundle exam/ --json bench.json",
    "tune": "tune bundle exam/ --goal latency --max-p99-ms 40",
    "serve": "serve bundle --config service.toml",
    "pack": "pack bundle --out stick --target aarch64 --python 3.11 --key key.pem",
    "doctor": "doctor --device cuda",
    "demo": "demo --out demo",
    "audit verify": "audit verify echoquad-service/audit --site-key echoquad-service/site.key",
    "fleet check": "fleet check http://cart-1:8770 http://cart-2:8770 --expect bundle",
    "data audit": "data audit data --out audit --strict",
    "data split": "data split frames --out data --mode link",
    "data patches": "data patches data --out data_patches",
    "data phantom": "data phantom data --patients 80",
}
"""The commands in the order of the help page, each with an example. See `load_command` for where they are."""

GROUPS: Final = {
    "audit": "Check the service's audit log.",
    "data": "Check data sets and create them.",
    "fleet": "Look after many services.",
}

INTERRUPTED: Final = 130  # 128 + SIGINT: what Typer returns in place of a KeyboardInterrupt

# Typer vendors click under a private name; its usage errors are reachable through the one class that it exports.
_TyperUsageError: Final[type[Exception]] = typer.BadParameter.__mro__[1]


def main() -> None:
    """Run the command line of this process and exit.

    An error becomes one line on stderr and an exit code. ``ECHOQUAD_TRACEBACK=1`` shows the traceback of an unexpected
    exception.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell: the next opened file would get its descriptor
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # help pages have characters that some encodings lack
    warnings.filterwarnings("ignore", module="PIL")  # a damaged frame has an error line of its own
    log_to_stderr()
    signals.install()
    code = _run(sys.argv[1:])
    signals.restore_defaults()
    try:
        sys.stdout.flush()
    except OSError:
        # The buffered rest cannot be written. Discard it, or Python prints a second error at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = code or 1
    sys.exit(code)


def load_command(name: str) -> Callable[..., Any]:
    """Import a command and return its function.

    Parameters
    ----------
    name
        A key of `COMMANDS`. ``"data audit"`` is the function ``audit`` of ``echoquad.cli.commands.data.audit``.
    """
    module = importlib.import_module(f"echoquad.cli.commands.{name.replace(' ', '.')}")
    command: Callable[..., Any] = getattr(module, name.rpartition(" ")[2])
    return command


def _run(arguments: Sequence[str]) -> int:
    """Run a command and return the exit code of the process."""
    try:
        return _invoke(arguments)
    except SystemExit as error:
        return int(error.code or 0)
    except BrokenPipeError:  # the reader of the pipe has gone, as `| head` does: this is no error
        return 1
    except KeyboardInterrupt:
        return _interrupted()
    except EchoQuadError as error:
        return print_error(error)
    except Exception as error:
        return _interrupted() if signals.received() else _unexpected(error)


def _invoke(arguments: Sequence[str]) -> int:
    """Parse the command line with Typer and run its command; return the exit code.

    Raises
    ------
    UsageError
        If Typer rejects the command line.
    KeyboardInterrupt
        If the command is interrupted.
    """
    application = typer.main.get_command(_build_application(_select_commands(arguments)))
    try:
        # Without `args`, Typer reads sys.argv and expands patterns on Windows, whose shell does not.
        code = application(prog_name="echoquad", standalone_mode=False)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except _TyperUsageError as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "echoquad"
        message = getattr(error, "format_message", error.__str__)().rstrip(".").replace("Value error, ", "")
        raise UsageError(f"{message}; see: {command} --help") from error
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    return int(code or 0)


def _select_commands(arguments: Sequence[str]) -> list[str]:
    """Return the commands that the line may name, so that the modules of the others are not imported."""
    for depth in (2, 1):
        if found := [name for name in COMMANDS if name.split()[:depth] == list(arguments[:depth])]:
            return found
    return list(COMMANDS)


def _build_application(commands: Sequence[str]) -> typer.Typer:
    app = typer.Typer(
        name="echoquad",
        help="From labelled echo frames to a checked ONNX bundle that a bedside cart can run. Research use only.",
        epilog="Exit codes: 0 done; 1 bad input, model or configuration; 2 usage; 3 parity or verification failed; "
        "4 the requested device is not available; 5 done, but some inputs failed.",
        context_settings={"help_option_names": ["-h", "--help"]},
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.callback(invoke_without_command=True)(_root_options)
    groups: dict[str, typer.Typer] = {}
    for name in commands:
        group, _, leaf = name.rpartition(" ")
        if group and group not in groups:
            groups[group] = typer.Typer(help=GROUPS[group])
            groups[group].callback(invoke_without_command=True)(_show_help)
            app.add_typer(groups[group], name=group)
        parent = groups[group] if group else app
        parent.command(leaf, epilog=f"Example: echoquad {COMMANDS[name]}")(load_command(name))
    return app


def _show_help(context: typer.Context) -> None:
    """Show the help if no command is given."""
    if context.invoked_subcommand is None:
        context.get_help()  # Typer prints it
        raise typer.Exit(UsageError.exit_code)


def _print_version(requested: bool) -> None:
    if requested:
        print_result(f"echoquad {__version__}")
        raise typer.Exit


def _root_options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Show the help if no command is given."""
    _show_help(context)


def _interrupted() -> int:
    print_status("interrupted")
    return signals.exit_code()


def _unexpected(error: Exception) -> int:
    if isinstance(error, ModuleNotFoundError) and error.name:
        from echoquad.cli.framework.extras import EXTRAS, missing_extra

        package = error.name.partition(".")[0]
        if package in EXTRAS:
            return print_error(missing_extra(package, EXTRAS[package]))
    if os.environ.get("ECHOQUAD_TRACEBACK"):
        raise error
    if isinstance(error, OSError) and error.filename and error.strerror:
        # No command checks each path for all that a system may refuse, such as a name that is too long.
        name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else str(error.filename)
        name = name if len(name) <= 100 else f"{name[:97]}..."
        return print_error(
            InputNotFoundError(f"{name}: cannot be used ({error.strerror}); check the path and its permissions")
        )
    return print_error(
        EchoQuadError(
            f"unexpected {type(error).__name__}: {error}; this is a fault in EchoQuad: please report it with the "
            "output of ECHOQUAD_TRACEBACK=1"
        )
    )
