"""The whole command line, in Typer: the help pages, and every line that is not plain."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Annotated, Any, Final

import typer

from echoquad.cli.console import say
from echoquad.cli.declare import for_typer, load
from echoquad_runtime._version import __version__
from echoquad_runtime.errors import UsageError

__all__ = ["run"]

GROUPS: Final = ("data",)  # commands with commands of their own, each a Typer application

INTERRUPTED: Final = 130  # 128 + SIGINT, which Typer gives without a word

# Typer carries a click of its own, under a private name: its classes are reached through the one that it exports.
_CommandLineError: Final[type[Exception]] = typer.BadParameter.__mro__[1]


def run(word: str, commands: Mapping[str, str]) -> object:
    """Run the process's command line; gives what its command gives.

    Parameters
    ----------
    word
        Its first word. Where that is a command, the modules of the others are not imported.
    commands
        By the name of every command an example of its use.

    Raises
    ------
    UsageError
        If the line is wrong.
    KeyboardInterrupt
        If the user has interrupted it.
    SystemExit
        As its command raises it, and where the reader of a pipe has gone.
    """
    known = {*commands, *GROUPS}
    try:
        code = _built(frozenset({word} if word in known else known), tuple(commands.items()))(
            prog_name="echoquad", standalone_mode=False
        )
    except typer.Abort:
        raise KeyboardInterrupt from None
    except _CommandLineError as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "echoquad"
        text = getattr(error, "format_message", error.__str__)().rstrip(".")
        raise UsageError(f"{text}; see: {command} --help") from error
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    return code


@functools.cache
def _built(names: frozenset[str], commands: tuple[tuple[str, str], ...]) -> Any:
    app = typer.Typer(
        name="echoquad",
        help="From labelled echo frames to a checked ONNX bundle that a bedside cart can run. Research use only.",
        epilog="Exit codes: 0 done; 1 bad input, model or configuration; 2 usage; 3 parity or verification failed; "
        "4 the device asked for is not there; 5 done, but some inputs failed.",
        context_settings={"help_option_names": ["-h", "--help"]},
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.callback(invoke_without_command=True)(_options)
    for name, example in commands:
        if name in names:
            app.command(name, epilog=f"Example: echoquad {example}")(for_typer(load(name)))
    for name in GROUPS:
        if name in names:
            app.add_typer(load(name, "app"), name=name)
    return typer.main.get_command(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        say(f"echoquad {__version__}")
        raise typer.Exit


def _options(
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
