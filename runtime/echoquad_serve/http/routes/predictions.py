"""``POST /api/v1/predict``: a frame, an object or a clip comes in, and its result goes out."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from http import HTTPStatus

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from echoquad_serve.http.backend import Backend
from echoquad_serve.http.context import Context, context_of
from echoquad_serve.http.error_responses import ApiError
from echoquad_serve.http.json_encoding import encode_json
from echoquad_serve.http.routes.parameters import check_parameters, switch
from echoquad_serve.http.routes.uploads import CHUNK_BYTES, Upload
from echoquad_serve.records import IncomingObject, Result

__all__ = ["predict"]

_MEDIA_TYPES = ("application/octet-stream", "application/dicom")
_MAX_KEY = 200
_FEW_ROWS = 16  # whose JSON does not keep other requests waiting


async def predict(request: Request) -> Response:
    """Store the body, and answer its result, or its number if the client does not wait.

    Raises
    ------
    ApiError
        If the request is refused.
    EchoQuadError
        If the service does not accept the object.
    """
    check_parameters(request, "name", "wait", "cam")
    wait, cam = switch(request, "wait", default=True), switch(request, "cam", default=False)
    _check_media_type(request)
    key = _idempotency_key(request)
    context = context_of(request)
    with context.predictions.hold():
        if _ask_first(request):
            await context.predictions.run(_admit, context.backend, int(request.headers.get("content-length", 0)))
        upload = Upload(context.backend.incoming, request.query_params.get("name", ""))
        try:
            await _receive(request, context, upload)
        except BaseException:
            upload.discard()
            raise
        sender = request.client.host if request.client else ""
        prediction = _Prediction(context.backend, upload, key, sender)
        if not wait:
            return await context.predictions.run(prediction.submit)
        result = await _in_time(await context.predictions.run(prediction.begin), context.limits.predict_s)
        headers = {"Content-Location": f"/api/v1/results/{result.id}"}
        if _prefers_png(request) and result.rows:
            png = await context.predictions.run(context.backend.overlay, result.id, 0, cam=cam)
            return Response(png, headers=headers, media_type="image/png")
        if len(result.rows) > _FEW_ROWS:
            body = await context.predictions.run(_encode, result)
        else:
            body = _encode(result)  # sooner than another thread
        return Response(body, _status(result), headers, "application/json")


class _Prediction:
    """The blocking part of a request. Whatever happens, no file stays that the service has not taken."""

    def __init__(self, backend: Backend, upload: Upload, key: str, sender: str) -> None:
        self._backend = backend
        self._upload = upload
        self._key = key
        self._sender = sender

    def submit(self) -> Response:
        """Put the object into the queue."""
        try:
            job = self._backend.submit(self._incoming())
        finally:
            self._upload.discard()
        location = {"Location": f"/api/v1/results/{job.id}"}
        return Response(encode_json({"id": job.id}), HTTPStatus.ACCEPTED, location, "application/json")

    def begin(self) -> Future[Result]:
        """Put the object into the queue and return the future of its result."""
        try:
            return self._backend.predict(self._incoming())
        finally:
            self._upload.discard()

    def _incoming(self) -> IncomingObject:
        _admit(self._backend, 0)
        path = self._upload.finish()
        return IncomingObject(path, "http", self._upload.name, self._key, self._sender)


async def _in_time(future: Future[Result], seconds: float) -> Result:
    """Return a result, which the thread that records it hands over itself."""
    try:
        return await asyncio.wait_for(asyncio.wrap_future(future), seconds)
    except TimeoutError as error:
        raise ApiError(
            HTTPStatus.GATEWAY_TIMEOUT,
            "E_RESULT_TIMEOUT",
            f"there is no result after {seconds:g} s; the object stays in the queue: repeat the request with the same "
            "Idempotency-Key, or read /api/v1/results later",
            {"Retry-After": "5"},
        ) from error


def _encode(result: Result) -> bytes:
    return encode_json(result.to_dict())


def _status(result: Result) -> HTTPStatus:
    return HTTPStatus.OK if result.status == "done" else HTTPStatus.UNPROCESSABLE_ENTITY


def _ask_first(request: Request) -> bool:
    """Return whether the body may be spared if the service cannot take it; a small one is on its way already."""
    length = request.headers.get("content-length")
    return length is None or int(length) > CHUNK_BYTES or "expect" in request.headers


def _admit(backend: Backend, length: int) -> None:
    """Refuse an object of `length` bytes that the service cannot take now."""
    if reasons := list(backend.unready_reasons()):
        raise ApiError(
            HTTPStatus.SERVICE_UNAVAILABLE,
            "E_NOT_READY",
            f"the service is not ready: {'; '.join(reasons)}; repeat the request after Retry-After seconds",
            {"Retry-After": "5"},
        )
    backend.check_room(length)


async def _receive(request: Request, context: Context, upload: Upload) -> None:
    try:
        async for data in request.stream():
            upload.add(data)
            if upload.full:
                await context.predictions.run(upload.write)
    except ClientDisconnect as error:
        # Nobody reads the answer.
        raise ApiError(HTTPStatus.BAD_REQUEST, "E_HTTP_BODY_CUT", "the connection was closed early") from error
    if not upload.size:
        raise ApiError(
            HTTPStatus.BAD_REQUEST, "E_HTTP_BODY_EMPTY", "the body is empty; expected an image, a DICOM file or a clip"
        )


def _check_media_type(request: Request) -> None:
    media_type = request.headers.get("content-type", _MEDIA_TYPES[0]).partition(";")[0].strip().lower()
    if media_type not in _MEDIA_TYPES and not media_type.startswith(("image/", "video/")):
        raise ApiError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            "E_HTTP_CONTENT_TYPE",
            "the Content-Type is not that of a frame; expected image/*, video/*, application/dicom or "
            "application/octet-stream, and the file itself as body",
        )
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            "E_HTTP_CONTENT_TYPE",
            "the body has a Content-Encoding; send the file as it is",
            {"Accept-Encoding": "identity"},
        )


def _idempotency_key(request: Request) -> str:
    key = request.headers.get("idempotency-key", "")
    if len(key) > _MAX_KEY or not (key.isascii() and key.isprintable()):
        raise ApiError(
            HTTPStatus.BAD_REQUEST,
            "E_HTTP_PARAMETER",
            f"header Idempotency-Key: expected at most {_MAX_KEY} printable ASCII characters",
        )
    return key


def _prefers_png(request: Request) -> bool:
    """Return whether ``Accept`` names PNG, and does not prefer JSON."""
    weights: dict[str, float] = {}
    for part in request.headers.get("accept", "").split(","):
        media_type, *parameters = (piece.strip().lower() for piece in part.split(";"))
        weight = next((piece[2:] for piece in parameters if piece.startswith("q=")), "1")
        try:
            weights[media_type] = float(weight)
        except ValueError:
            weights[media_type] = 0.0
    return weights.get("image/png", 0.0) > 0 and weights["image/png"] >= weights.get("application/json", 0.0)
