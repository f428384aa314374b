"""Limits of the listener: how much, how slow and how many requests may be."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Limits"]


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits that protect the service from slow, large and numerous requests.

    Attributes
    ----------
    header_bytes, headers
        Size of all headers of a request, and their number.
    header_s
        Seconds until the headers of a request are complete.
    body_s
        Seconds of waiting for a whole body, at most.
    body_grace_s, body_bytes_per_s
        A body may be late by `body_grace_s` seconds against a client that sends `body_bytes_per_s`.
    write_stall_s
        Seconds after which a client that reads nothing is disconnected.
    linger_s
        Seconds for which the rest of a refused body is read and dropped, so that the client sees the answer.
    predictions
        Requests to decide an object at the same time; the next one is refused.
    predict_s
        Seconds to wait for a result.
    tensor_threads, tensors
        Threads that decide the tensors of KServe clients, and such requests at the same time; the next one is refused.
    tensor_bytes, tensor_json_bytes
        Size of a request of a KServe client, compressed and inflated, and of the JSON in it. A request stays in memory,
        where JSON takes up to 12 times its size, and all threads wait while JSON is read.
    tensor_arrays
        Arrays and objects in the JSON of such a request; they take more time and memory than numbers.
    tensor_frames
        Frames of such a request.
    read_threads, reads
        Threads that read results and draw, and requests that may wait for them.
    event_streams, live_streams
        Clients of the event stream, and of the live view.
    event_queue
        Results that wait for one client. Older ones are read from the store again.
    heartbeat_s
        Seconds of silence after which an event stream sends a comment.
    live_start_s
        Seconds to wait for the first live frame.
    connections, remote_connections
        Open connections, and those of them that do not come from this machine.
    keep_alive_s
        Seconds for which a connection may be idle.
    shutdown_s
        Seconds for open requests to end when the service stops.
    """

    header_bytes: int = 32 * 1024
    headers: int = 100
    header_s: float = 10.0
    body_s: float = 600.0
    body_grace_s: float = 10.0
    body_bytes_per_s: float = 16 * 1024
    write_stall_s: float = 15.0
    linger_s: float = 5.0
    predictions: int = 16
    predict_s: float = 60.0
    tensor_threads: int = 2
    tensors: int = 16
    tensor_bytes: int = 32 * 1024 * 1024
    tensor_json_bytes: int = 4 * 1024 * 1024
    tensor_arrays: int = 100_000
    tensor_frames: int = 64
    read_threads: int = 4
    reads: int = 64
    event_streams: int = 32
    live_streams: int = 8
    event_queue: int = 256
    heartbeat_s: float = 10.0
    live_start_s: float = 5.0
    connections: int = 400
    remote_connections: int = 300
    keep_alive_s: int = 30
    shutdown_s: int = 10
