"""``GET /api/v1/live/stream``: the live source as JPEG pictures, one after another, for an ``img`` element.

A client that is slower than the source gets the newest picture, not all of them.
"""

from __future__ import annotations

import logging
import threading
from contextlib import suppress
from http import HTTPStatus

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from echoquad_serve.http.backend import Backend
from echoquad_serve.http.context import Context, context_of
from echoquad_serve.http.error_responses import busy_error, error_response
from echoquad_serve.http.open_streams import OpenStream
from echoquad_serve.http.routes.parameters import check_parameters

__all__ = ["live_stream"]

_LOGGER = logging.getLogger("echoquad_serve.http")
_MEDIA_TYPE = "multipart/x-mixed-replace; boundary=frame"
_BOUNDARY = b"--frame\r\n"
_WAIT_S = 10.0


async def live_stream(request: Request) -> Response:
    """Answer a stream of pictures, which ends with the connection, the source or the service.

    Raises
    ------
    ApiError
        If too many streams are open: 503.
    """
    check_parameters(request)
    context = context_of(request)
    context.live.check_room()
    if request.method == "HEAD":
        return Response(headers={"Content-Type": _MEDIA_TYPE})
    return _LiveResponse(context)


class _LiveResponse(Response):
    def __init__(self, context: Context) -> None:
        self._context = context
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._context.live.open(receive) as stream:
            frames = _NewestFrame(stream)
            name = "echoquad-http-live"
            threading.Thread(target=frames.read, args=(self._context.backend,), name=name, daemon=True).start()
            try:
                # The status code depends on whether there is a picture at all.
                await stream.wait(self._context.limits.live_start_s)
                frame = frames.take()
                if frame is None:
                    await self._refusal(scope, frames)(scope, receive, send)
                    return
                headers = [(b"content-type", _MEDIA_TYPE.encode()), (b"x-accel-buffering", b"no")]
                await send({"type": "http.response.start", "status": HTTPStatus.OK, "headers": headers})
                await send({"type": "http.response.body", "body": _BOUNDARY, "more_body": True})
                while True:
                    if frame is not None:
                        await send({"type": "http.response.body", "body": _part(frame), "more_body": True})
                    elif stream.ended or frames.ended:
                        break
                    else:
                        await stream.wait(_WAIT_S)
                    frame = None if stream.ended else frames.take()
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            finally:
                stream.ended = True  # which the thread sees at its next picture

    @staticmethod
    def _refusal(scope: Scope, frames: _NewestFrame) -> Response:
        if frames.ended:
            message = "there is no live source; configure one with --source"
            return error_response(scope["path"], HTTPStatus.NOT_FOUND, "E_LIVE_SOURCE", message)
        error = busy_error("the live source has no picture; /api/v1/status says why", status=503, retry_after=2.0)
        return error_response(scope["path"], error.status_code, "E_LIVE_SOURCE", str(error.detail), error.headers)


class _NewestFrame:
    """The newest picture, which a thread reads from the source.

    Attributes
    ----------
    ended
        Whether the source has ended.
    """

    def __init__(self, stream: OpenStream) -> None:
        self.ended = False
        self._stream = stream
        self._frame: bytes | None = None

    def take(self) -> bytes | None:
        """Return the newest picture; None if it was returned already."""
        frame, self._frame = self._frame, None
        return frame

    def read(self, backend: Backend) -> None:
        """Read pictures until the source or the stream ends."""
        try:
            for frame in backend.live_frames():
                if self._stream.ended:
                    break
                self._put(frame)
        except Exception as error:
            _LOGGER.error("the live view ended: %s", type(error).__name__)
        finally:
            self._put(None)

    def _put(self, frame: bytes | None) -> None:
        with suppress(RuntimeError):  # the loop has ended, and the stream with it
            self._stream.loop.call_soon_threadsafe(self._set, frame)

    def _set(self, frame: bytes | None) -> None:
        if frame is None:
            self.ended = True
        else:
            self._frame = frame
        self._stream.wake()


def _part(frame: bytes) -> bytes:
    """Return a picture with the boundary after it, by which a browser knows that it may show it."""
    head = f"Content-Type: image/jpeg\r\nContent-Length: {len(frame)}\r\n\r\n".encode()
    return b"".join((head, frame, b"\r\n", _BOUNDARY))
