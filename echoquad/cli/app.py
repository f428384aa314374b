"""The application: its commands, and the one place where errors become exit codes."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Final

from echoquad.cli import signals
from echoquad.cli.console import fail, note
from echoquad.cli.declare import load, read_plainly
from echoquad_runtime.errors import EchoQuadError

__all__ = ["COMMANDS", "main"]

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
    "doctor": "doctor --device cuda",
    "demo": "demo --out demo",
}
"""Commands, in the order of the help, and an example of each. Each is a function in a module, both of its name."""


def main() -> None:
    """Run the command line; an error becomes one line on stderr and an exit code, never a traceback.

    ``ECHOQUAD_TRACEBACK=1`` shows the traceback of what is not supposed to happen.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell; else the next file that is opened would get its number
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
    warnings.filterwarnings("ignore", module="PIL")  # what is wrong with a frame is told by its own line
    signals.listen()
    code = _run(sys.argv[1:])
    signals.forget()
    try:
        sys.stdout.flush()
    except OSError:
        # What is still buffered has nowhere to go, and Python would complain of it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = code or 1
    sys.exit(code)


def _run(words: list[str]) -> int:
    word = words[0] if words else ""
    try:
        return int(_call(word, words[1:]) or 0)  # type: ignore[call-overload, no-any-return]
    except SystemExit as error:
        return int(error.code or 0)
    except BrokenPipeError:  # the reader of a pipe has gone: nobody is left to be told
        return 1
    except KeyboardInterrupt:
        return _interrupted()
    except EchoQuadError as error:
        return fail(error)
    except Exception as error:
        return _interrupted() if signals.came() else _unexpected(error)


def _call(word: str, rest: list[str]) -> object:
    if word in COMMANDS:
        command = load(word)
        if (values := read_plainly(command, rest)) is not None:
            return command(**values)
    from echoquad.cli import full

    return full.run(word, COMMANDS)


def _interrupted() -> int:
    note("interrupted")
    return signals.exit_code()


def _unexpected(error: Exception) -> int:
    if isinstance(error, ModuleNotFoundError) and error.name:
        from echoquad.cli.extras import EXTRAS, missing_extra

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
