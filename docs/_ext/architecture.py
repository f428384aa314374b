"""Draw the packages and their layers, as the import contracts in pyproject.toml state them.

``python docs/_ext/architecture.py`` writes ``docs/images/architecture.svg``. A test compares the two, so the drawing is
what ``lint-imports`` enforces.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TARGET = ROOT / "docs" / "images" / "architecture.svg"

PANELS = (  # package, what it is, colour, width
    ("echoquad", "command line", "#7d4e78", 140),
    ("echoquad_export", "run to bundle", "#3d6494", 164),
    ("echoquad_train", "frames to run", "#2f7452", 212),
    ("echoquad_runtime", "frames to decisions", "#0b6578", 226),
)
GAP, TOP, ROW, PAD = 30, 12, 36, 8


def layers_of(package: str, contracts: list[dict[str, Any]]) -> list[list[str]]:
    """Return the layers of a package from top to bottom, each with the names of its modules or sub-packages."""
    for contract in contracts:
        containers = contract.get("containers", [])
        if contract["type"] == "layers" and any(re.match(rf"{package}(\.cli)?$", name) for name in containers):
            return [re.split(r"\s*[|:]\s*", layer.strip("()")) for layer in contract["layers"]]
    return [["cli"]]


def draw() -> str:
    """Return the drawing as SVG."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    stacks = [layers_of(package, contracts) for package, *_ in PANELS]
    height = TOP + 56 + max(map(len, stacks)) * ROW + PAD
    width = sum(panel[-1] for panel in PANELS) + GAP * (len(PANELS) - 1) + 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height + 2}" role="img" '
        'font-family="system-ui, sans-serif" text-anchor="middle">',
        "<title>Packages of EchoQuad: each imports only what lies below it and to its right</title>",
    ]
    left = 1
    for (package, purpose, colour, across), stack in zip(PANELS, stacks, strict=True):
        tall = 56 + len(stack) * ROW + PAD - 4
        parts += [
            f'<rect x="{left}" y="{TOP}" width="{across}" height="{tall}" rx="8" fill="{colour}" fill-opacity="0.12" '
            f'stroke="{colour}"/>',
            f'<rect x="{left}" y="{TOP}" width="{across}" height="46" rx="8" fill="{colour}"/>',
            _text(left + across / 2, TOP + 19, package, 14, "#fff", "bold"),
            _text(left + across / 2, TOP + 36, purpose, 12, "#fff"),
        ]
        for number, names in enumerate(stack):
            room = (across - PAD) / len(names)
            for place, name in enumerate(names):
                x, y = left + PAD / 2 + place * room + 3, TOP + 54 + number * ROW
                parts.append(
                    f'<rect x="{x:g}" y="{y}" width="{room - 6:g}" height="28" rx="4" fill="{colour}"/>'
                    + _text(x + room / 2 - 3, y + 18, name, 13 if len(names) < 3 else 11.5, "#fff")
                )
        left += across
        if package != PANELS[-1][0]:
            y = TOP + 23
            parts.append(
                f'<path d="M{left + 3} {y}H{left + GAP - 10}" stroke="#7a8794" stroke-width="3"/>'
                f'<path d="M{left + GAP - 2} {y}l-11 -6v12z" fill="#7a8794"/>'
            )
        left += GAP
    return "\n".join([*parts, "</svg>", ""])


def _text(x: float, y: float, text: str, size: float, colour: str, weight: str = "normal") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{colour}" font-weight="{weight}">{text}</text>'


if __name__ == "__main__":
    TARGET.write_text(draw(), "utf-8")
