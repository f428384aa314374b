"""Measure EchoQuad on a GPU: the entry point of the package `gpu`; see docs/how-to/gpu.md and `--help`."""

from __future__ import annotations

from gpu.main import main  # the package beside this file; Python prefers it to a module of the same name

if __name__ == "__main__":
    main()
