"""Worker of the bundle fuzzing: corrupts bundles and uses them in its own process.

It reads a configuration, then one number per line, and answers each number with a JSON line.
``test_bundle_fuzzing.py`` runs it.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bundle_corruptions import corrupt

from echoquad.cli.framework.main import main as echoquad_main
from echoquad_runtime.bundle.bundle import Bundle

with contextlib.suppress(ImportError):  # Windows
    import resource

    # A larger allocation fails, instead of exhausting the machine.
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))

FORBIDDEN = ("Traceback", "this is a fault in EchoQuad", "[E:onnxruntime", "[W:onnxruntime")
LONGEST_LINE = 2000
ROUNDING = 1e-4  # rows have four decimals


def run(*arguments: object) -> tuple[int, str, str]:
    """Run a command line and return its exit code, stdout and stderr."""
    sys.argv[1:] = list(map(str, arguments))
    kept = sys.stdout, sys.stderr
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", newline="\n") for _ in range(2)]
    sys.stdout, sys.stderr = streams
    try:
        echoquad_main()
    except SystemExit as ended:
        code = ended.code
    finally:
        sys.stdout, sys.stderr = kept
    for stream in streams:
        stream.flush()
    return code, *(stream.buffer.getvalue().decode() for stream in streams)


def find_faults(name: str, code: int, out: str, err: str, allowed: tuple[int, ...]) -> list[str]:
    """Return what a command did that no command may do, whatever the bundle."""
    errors = [line for line in err.splitlines() if line.startswith("error[E_")]
    found = []
    if code not in allowed:
        found.append(f"{name}: exit code {code}")
    if code == 0 and errors:
        found.append(f"{name}: an error, and exit code 0")
    if code != 0 and not errors:
        found.append(f"{name}: exit code {code} and no error")
    if code != 0 and name == "verify" and (out or len(errors) != 1):
        found.append(f"{name}: refused in {len(errors)} lines")
    found += [f"{name}: {text}" for text in FORBIDDEN if text in out + err]
    found += [f"{name}: a line of {len(line)} characters" for line in err.splitlines() if len(line) > LONGEST_LINE]
    return found


def parse_rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def same_within(found: str, expected: str, gate: float) -> bool:
    """Return whether two tables have equal frames and decisions, and probabilities within twice `gate`."""
    one, other = parse_rows(found), parse_rows(expected)
    if [row.keys() for row in one] != [row.keys() for row in other]:
        return False
    return all(
        abs(float(row[key]) - float(true[key])) <= 2 * gate + ROUNDING
        if key.startswith(("prob_", "p_"))
        else row[key] == true[key]
        for row, true in zip(one, other, strict=True)
        for key in row
        if key != "flags"
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


class Worker:
    """Compares the results of corrupted bundles with those of the valid bundle."""

    def __init__(self, bundle: str, frames: str, scratch: str, public_key: str | None, sabotage: str) -> None:
        self.bundle, self.frames, self.scratch = Path(bundle), frames, Path(scratch)
        self.key = ["--public-key", public_key] if public_key else []
        self.expected, self.gates = {}, {}
        valid = Bundle(self.bundle)
        for precision in valid.precisions:
            options = ["--device", "cpu", "--threads", "1", "--precision", precision, *self.key]
            code, out, err = run("verify", self.bundle, *options)
            assert code == 0, (out, err)
            code, self.expected[precision], err = run("predict", self.bundle, frames, "--untuned", *options)
            assert code == 0, err
            self.gates[precision] = valid.gate(precision)["max_abs_dprobability"]
        exec(sabotage, globals())

    def check(self, seed: int) -> dict[str, Any]:
        folder = self.scratch / f"bundle-{seed}"
        shutil.copytree(self.bundle, folder)
        try:
            done = corrupt(folder, seed)
            # If a graph was corrupted, that graph is run.
            (precision,) = [name for name in self.expected if name in done.file] or [
                list(self.expected)[seed // 10 % 2]
            ]
            return {**asdict(done), "precision": precision, **self.use(folder, precision, done.forged)}
        finally:
            with contextlib.suppress(OSError):
                folder.chmod(0o700)
            shutil.rmtree(folder, ignore_errors=True)

    def use(self, folder: Path, precision: str, forged: bool) -> dict[str, Any]:
        options = ["--device", "cpu", "--threads", "1", "--precision", precision, *self.key]
        verified, out, err = run("verify", folder, *options)
        faults = find_faults("verify", verified, out, err, (0, 1, 3))
        why = err.replace(str(folder), "BUNDLE").strip().splitlines()[-1:]
        predicted, rows, err = run("predict", folder, self.frames, "--untuned", *options)
        expected, decided = self.expected[precision], predicted in (0, 5) and bool(rows)
        # A frame for which a forged graph returns NaN is a failed input.
        faults += find_faults("predict", predicted, rows, err, (0, 1, 3, 5) if forged else (0, 1, 3))
        if self.key and forged and (verified, predicted) != (3, 3) and contents(folder) != contents(self.bundle):
            faults.append(f"a forgery passes the signature: {verified}, {predicted}")
        if decided and not forged and rows != expected:
            faults.append("another decision")
        if verified == 0 and not (predicted == 0 and same_within(rows, expected, self.gates[precision])):
            faults.append("verify passes, and predict decides differently")
        outcome = "refused"
        if verified == 0:
            outcome = "harmless: the same outputs"
        elif decided:
            same = rows == expected
            outcome = "refused by verify; predict decides the same" if same else "refused by verify alone"
        return {"outcome": outcome, "verify": verified, "predict": predicted, "why": why, "faults": faults}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    worker = Worker(**json.loads(sys.stdin.readline()))
    for line in sys.stdin:
        print(json.dumps(worker.check(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
