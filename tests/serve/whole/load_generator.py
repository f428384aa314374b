"""A load generator: ``load_generator.py PORT FILE CLIENTS RATE SECONDS`` posts a frame again and again, prints JSON.

Each client has a connection, sends RATE / CLIENTS requests a second, and waits for each answer. RATE 0 sends the next
one at once. It is a process of its own, so that it does not share an interpreter with what measures.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path


class Outcome:
    """What a client saw."""

    def __init__(self) -> None:
        self.accepted_s: list[float] = []
        self.refused_s: list[float] = []
        self.statuses: dict[int, int] = {}
        self.without_retry_after = self.cut = 0


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
    await reader.readexactly(int(headers["content-length"]))
    return int(head[0].split()[1]), headers


async def client(port: int, request: bytes, interval: float, offset: float, seconds: float, outcome: Outcome) -> None:
    await asyncio.sleep(offset)
    end = time.monotonic() + seconds
    reader = writer = None
    due = time.monotonic()
    while (now := time.monotonic()) < end:
        if due > now:
            await asyncio.sleep(due - now)
        due = max(due + interval, time.monotonic() - interval)
        begin = time.perf_counter()
        try:
            if writer is None:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
            assert reader is not None
            writer.write(request)
            status, headers = await asyncio.wait_for(answer(reader), 60)
        except (OSError, asyncio.IncompleteReadError):
            outcome.cut += 1
            writer = None
            continue
        elapsed = time.perf_counter() - begin
        outcome.statuses[status] = outcome.statuses.get(status, 0) + 1
        if status == 200:
            outcome.accepted_s.append(elapsed)
        else:
            outcome.refused_s.append(elapsed)
            outcome.without_retry_after += "retry-after" not in headers
        if headers.get("connection", "").lower() == "close":
            writer.close()
            writer = None


async def generate(port: int, body: bytes, clients: int, rate: float, seconds: float) -> Outcome:
    head = (
        f"POST /api/v1/predict HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: image/png\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    request, outcome = head.encode() + body, Outcome()
    interval = clients / rate if rate else 0.0
    offsets = [interval * number / clients for number in range(clients)]
    await asyncio.gather(*(client(port, request, interval, offset, seconds, outcome) for offset in offsets))
    return outcome


if __name__ == "__main__":
    found = asyncio.run(
        generate(
            int(sys.argv[1]), Path(sys.argv[2]).read_bytes(), int(sys.argv[3]), float(sys.argv[4]), float(sys.argv[5])
        )
    )
    print(json.dumps(vars(found)))  # noqa: T201
