"""Corrupts bundles and uses them, in a process of its own, whose death or silence its parent can see.

Reads a configuration, then numbers, a JSON line each; answers each number with a JSON line. Run by ``test_fuzz.py``.
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

from corruptions import corrupt

from echoquad.cli.framework.main import main as echoquad_main
from echoquad_runtime.bundle.bundle import Bundle

with contextlib.suppress(ImportError):  # Windows
    import resource

    # What asks for more is told so by Python or onnxruntime, and does not take the machine with it.
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))

FORBIDDEN = ("Traceback", "this is a fault in EchoQuad", "[E:onnxruntime", "[W:onnxruntime")
LONGEST_LINE = 2000
ROUNDING = 1e-4  # of the four decimals that are printed


def run(*arguments: object) -> tuple[int, str, str]:
    """Run a command line; gives its exit code, stdout and stderr."""
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


def faults_of(name: str, code: int, out: str, err: str, allowed: tuple[int, ...]) -> list[str]:
    """Say what a command did that none may do, whatever bundle it is given."""
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


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def same_within(found: str, expected: str, gate: float) -> bool:
    """Whether two tables have the same frames and decisions, and probabilities that differ by at most twice `gate`."""
    one, other = rows_of(found), rows_of(expected)
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
    """Judges one corruption after the other against what the whole bundle gives."""

    def __init__(self, bundle: str, frames: str, scratch: str, public_key: str | None, sabotage: str) -> None:
        self.bundle, self.frames, self.scratch = Path(bundle), frames, Path(scratch)
        self.key = ["--public-key", public_key] if public_key else []
        self.expected, self.gates = {}, {}
        whole = Bundle(self.bundle)
        for precision in whole.precisions:
            options = ["--device", "cpu", "--threads", "1", "--precision", precision, *self.key]
            code, said, why = run("verify", self.bundle, *options)
            assert code == 0, (said, why)
            code, self.expected[precision], why = run("predict", self.bundle, frames, "--untuned", *options)
            assert code == 0, why
            self.gates[precision] = whole.gate(precision)["max_abs_dprobability"]
        exec(sabotage, globals())

    def judge(self, seed: int) -> dict[str, Any]:
        folder = self.scratch / f"bundle-{seed}"
        shutil.copytree(self.bundle, folder)
        try:
            done = corrupt(folder, seed)
            # The graph that was corrupted is run, where it was one.
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
        faults = faults_of("verify", verified, out, err, (0, 1, 3))
        why = err.replace(str(folder), "BUNDLE").strip().splitlines()[-1:]
        predicted, rows, err = run("predict", folder, self.frames, "--untuned", *options)
        expected, judged = self.expected[precision], predicted in (0, 5) and bool(rows)
        # A frame that a forged graph has no number for is a failed input.
        faults += faults_of("predict", predicted, rows, err, (0, 1, 3, 5) if forged else (0, 1, 3))
        if self.key and forged and (verified, predicted) != (3, 3) and contents(folder) != contents(self.bundle):
            faults.append(f"a forgery passes the signature: {verified}, {predicted}")
        if judged and not forged and rows != expected:
            faults.append("another decision")
        if verified == 0 and not (predicted == 0 and same_within(rows, expected, self.gates[precision])):
            faults.append("verify passes, and predict gives another decision")
        outcome = "refused"
        if verified == 0:
            outcome = "harmless: the same outputs"
        elif judged:
            same = rows == expected
            outcome = "refused by verify; predict gives the same" if same else "refused by verify alone"
        return {"outcome": outcome, "verify": verified, "predict": predicted, "why": why, "faults": faults}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    worker = Worker(**json.loads(sys.stdin.readline()))
    for line in sys.stdin:
        print(json.dumps(worker.judge(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
