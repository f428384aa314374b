"""Inference requests as no client library sends them: each gets one line that says what is wrong, and nothing else."""

from __future__ import annotations

import gzip
import json
import math
import struct
import zlib
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_server import LIMITS, Served

HEADER = "Inference-Header-Content-Length"
INFER = "/v2/models/echoquad/infer"


def post(client: httpx.Client, body: bytes, path: str = INFER, **headers: str) -> httpx.Response:
    return client.post(path, content=body, headers={name.replace("_", "-"): value for name, value in headers.items()})


def error_of(answer: httpx.Response) -> str:
    """Return the message of an answer that has nothing but a message of one line."""
    value = answer.json()
    assert list(value) == ["error"]
    message = value["error"]
    assert isinstance(message, str)
    assert message.isprintable()
    assert 10 < len(message) < 400
    return message


def frames_tensor(levels: np.ndarray, **changes: Any) -> dict[str, Any]:
    tensor = {"name": "frames", "datatype": "UINT8", "shape": list(levels.shape), "data": levels.tolist()}
    return {key: value for key, value in {**tensor, **changes}.items() if value is not ...}


def request_of(*tensors: Any, **values: Any) -> bytes:
    return json.dumps({"inputs": list(tensors), **values}).encode()


LEVELS = (np.arange(2 * 6 * 8) % 251).astype(np.uint8).reshape(2, 6, 8)
BINARY = request_of(
    frames_tensor(LEVELS, data=..., parameters={"binary_data_size": LEVELS.size}), id="one", outputs=[{"name": "votes"}]
)


def test_json_is_answered_with_json(client: httpx.Client) -> None:
    answer = post(client, request_of(frames_tensor(LEVELS), id="a \u00e9 \U0001f600"), Content_Type="application/json")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert HEADER not in answer.headers
    value = answer.json()
    assert value["id"] == "a \u00e9 \U0001f600"
    outputs = {output["name"]: output for output in value["outputs"]}
    assert [label in ("ASD", "NORM") for label in outputs["label"]["data"]] == [True, True]
    assert outputs["abstained"] == {"name": "abstained", "datatype": "BOOL", "shape": [2], "data": [False, False]}
    for output in outputs.values():
        assert len(output["data"]) == math.prod(output["shape"])


@pytest.mark.parametrize("levels", [LEVELS.ravel().tolist(), LEVELS.tolist(), LEVELS.astype(float).tolist()])
@pytest.mark.parametrize("datatype", ["UINT8", "FP32"])
def test_numbers_may_be_flat_or_nested(client: httpx.Client, levels: Any, datatype: str) -> None:
    answer = post(client, request_of(frames_tensor(LEVELS, data=levels, datatype=datatype)))
    expected = post(client, request_of(frames_tensor(LEVELS)))
    assert answer.status_code == 200
    assert answer.json()["outputs"] == expected.json()["outputs"]


def test_an_id_that_is_not_sent_is_not_answered(client: httpx.Client) -> None:
    assert "id" not in post(client, request_of(frames_tensor(LEVELS))).json()
    assert post(client, request_of(frames_tensor(LEVELS), id="")).json()["id"] == ""


def test_binary_answer_has_little_endian_numbers_and_counted_texts(client: httpx.Client) -> None:
    outputs = [{"name": "label", "parameters": {"binary_data": True}}, {"name": "votes"}, {"name": "confidence"}]
    body = request_of(frames_tensor(LEVELS), outputs=outputs, parameters={"binary_data_output": True})
    answer = post(client, body)
    assert answer.headers["content-type"] == "application/octet-stream"
    length = int(answer.headers[HEADER])
    header, data = json.loads(answer.content[:length]), answer.content[length:]
    sizes = [output["parameters"]["binary_data_size"] for output in header["outputs"]]
    assert sum(sizes) == len(data)
    texts, rest = data[: sizes[0]], data[sizes[0] :]
    (first,) = struct.unpack_from("<I", texts)
    assert texts[4 : 4 + first] in (b"ASD", b"NORM")
    assert sizes[0] == sum(4 + len(label) for label in labels_of(client, LEVELS))
    assert struct.unpack_from("<4i", rest)[:2] in {(4, 0), (3, 1), (2, 2), (1, 3), (0, 4)}
    assert 0 < struct.unpack_from("<f", rest, sizes[1])[0] <= 1


def labels_of(client: httpx.Client, levels: np.ndarray) -> list[str]:
    answer = post(client, request_of(frames_tensor(levels), outputs=[{"name": "label"}]))
    return answer.json()["outputs"][0]["data"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "JSON"),
        (b"\xff\xfe{\x00}\x00", "UTF-8"),
        (b"[]", "JSON object"),
        (b"null", "JSON object"),
        (b'{"inputs":', "JSON"),
        (b"[" * 10_000, "JSON"),
        (b'{"inputs":' + b'{"a":' * 9_000 + b"1" + b"}" * 9_001, "JSON"),
        (b'{"inputs":[{"name":"frames","shape":' + b"[" * 500 + b"]" * 500 + b',"datatype":"UINT8"}]}', "shape"),
        (b"{}", "inputs"),
        (request_of(), "0 inputs"),
        (request_of(frames_tensor(LEVELS), frames_tensor(LEVELS)), "2 inputs"),
        (request_of(7), "JSON object"),
        (request_of({}), "no input None"),
        (request_of(frames_tensor(LEVELS, name="image\n\u202e")), "no input"),
        (request_of(frames_tensor(LEVELS, name=["frames"])), "no input"),
        (request_of(frames_tensor(LEVELS, datatype="INT64")), "INT64"),
        (request_of(frames_tensor(LEVELS, datatype=["UINT8"])), "datatype"),
        (request_of(frames_tensor(LEVELS, datatype=...)), "datatype None"),
        (request_of(frames_tensor(LEVELS, data=...)), "no data"),
        (request_of(frames_tensor(LEVELS, data="AAAA")), "no array"),
        (request_of(frames_tensor(LEVELS, data={})), "no array"),
        (request_of(frames_tensor(LEVELS, data=[])), "shape"),
        (request_of(frames_tensor(LEVELS, data=LEVELS.ravel().tolist()[:-1])), "96 numbers"),
        (request_of(frames_tensor(LEVELS, data=LEVELS.swapaxes(1, 2).tolist())), "nested"),
        (request_of(frames_tensor(LEVELS, data=[[[1] * 8] * 6, 5])), "nested"),
        (request_of(frames_tensor(LEVELS, data=["1"] * 96)), "something else than numbers"),
        (request_of(frames_tensor(LEVELS, data=[True] * 96)), "something else than numbers"),
        (request_of(frames_tensor(LEVELS, data=[None] * 96)), "something else than numbers"),
        (request_of(frames_tensor(LEVELS, data=[1] * 95 + [[1]])), "something else than numbers"),
        (request_of(frames_tensor(LEVELS, data=[1] * 95 + ["x" * 50_000])), "something else than numbers"),
        (request_of(frames_tensor(LEVELS, data=[256] * 96)), "0 to 255"),
        (request_of(frames_tensor(LEVELS, data=[-1] * 96)), "0 to 255"),
        (request_of(frames_tensor(LEVELS, data=[0.5] * 96)), "0 to 255"),
        (request_of(frames_tensor(LEVELS, data=[10**400] * 96)), "0 to 255"),
        (request_of(frames_tensor(LEVELS, data=[10**400] * 96, datatype="FP32")), "NaN or infinity"),
        (request_of(frames_tensor(LEVELS, data=[1e300] * 96, datatype="FP32")), "NaN or infinity"),
        (request_of(frames_tensor(LEVELS, data=[math.nan] * 96, datatype="FP32")), "NaN"),
        (request_of(frames_tensor(LEVELS, data=[math.inf] * 96, datatype="FP32")), "Infinity"),
        (request_of(frames_tensor(LEVELS)).replace(b"95", b"1e999"), "0 to 255"),
        (request_of(frames_tensor(LEVELS, data=[9.5] * 96, datatype="FP32")), "fractions"),
        (b'{"inputs":[{"data":[' + b"9" * 5000 + b"]}]}", "JSON"),
        (request_of(frames_tensor(LEVELS, shape=...)), "shape None"),
        (request_of(frames_tensor(LEVELS, shape=[])), "positive"),
        (request_of(frames_tensor(LEVELS, shape="2x6x8")), "positive"),
        (request_of(frames_tensor(LEVELS, shape=[2, 6, -8])), "positive"),
        (request_of(frames_tensor(LEVELS, shape=[0, 6, 8], data=[])), "positive"),
        (request_of(frames_tensor(LEVELS, shape=[2, 6, 8.0])), "positive"),
        (request_of(frames_tensor(LEVELS, shape=[True, 6, 8])), "positive"),
        (request_of(frames_tensor(LEVELS, shape=[2, 48])), "[N, height, width]"),
        (request_of(frames_tensor(LEVELS, shape=[2, 6, 4, 2])), "[N, height, width]"),
        (request_of(frames_tensor(LEVELS, shape=[2, 6, 8, 4])), "[N, height, width]"),
        (request_of(frames_tensor(LEVELS, shape=[1] * 96)), "positive"),
        (request_of(frames_tensor(LEVELS, shape=[9, 6, 8])), "at most 8"),
        (request_of(frames_tensor(LEVELS, shape=[1, 2**31, 2**29])), "shape"),
        (request_of(frames_tensor(LEVELS, shape=[1, 10**2000, 10**2000])), "shape"),
        (request_of(frames_tensor(LEVELS, name="quadrants")), "quadrants LA, RA, LV, RV"),
        (request_of(frames_tensor(LEVELS, name="quadrants", shape=[1, 4, 3, 32, 32])), "send whole frames"),
        (request_of(frames_tensor(LEVELS, parameters=[])), "JSON object"),
        (request_of(frames_tensor(LEVELS, parameters={"binary_data_size": 96})), "one of them"),
        (request_of(frames_tensor(LEVELS, parameters={"shared_memory_region": "x"})), "shared memory"),
        (request_of(frames_tensor(LEVELS), parameters=1), "JSON object"),
        (request_of(frames_tensor(LEVELS), parameters={"binary_data_output": 1}), "true or false"),
        (request_of(frames_tensor(LEVELS), outputs={}), "no array"),
        (request_of(frames_tensor(LEVELS), outputs=["label"]), "JSON object"),
        (request_of(frames_tensor(LEVELS), outputs=[{}]), "no output None"),
        (request_of(frames_tensor(LEVELS), outputs=[{"name": ["label"]}]), "no output"),
        (request_of(frames_tensor(LEVELS), outputs=[{"name": "logits"}]), "expected some of label"),
        (request_of(frames_tensor(LEVELS), outputs=[{"name": "label"}] * 2), "twice"),
        (
            request_of(frames_tensor(LEVELS), outputs=[{"name": "label", "parameters": {"binary_data": "yes"}}]),
            "true or false",
        ),
        (request_of(frames_tensor(LEVELS), id=7), "text"),
        (request_of(frames_tensor(LEVELS), id="x" * 1001), "text"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(client: httpx.Client, body: bytes, words: str) -> None:
    answer = post(client, body)
    assert answer.status_code == 400, answer.text
    assert words in error_of(answer)


@pytest.mark.parametrize(
    ("json_bytes", "data", "words"),
    [
        (None, LEVELS.tobytes(), "no JSON"),
        ("", LEVELS.tobytes(), HEADER),
        ("0", LEVELS.tobytes(), "no JSON"),
        ("-1", LEVELS.tobytes(), HEADER),
        ("1_0", LEVELS.tobytes(), HEADER),
        ("1e3", LEVELS.tobytes(), HEADER),
        ("9" * 30, LEVELS.tobytes(), HEADER),
        ("\u00b2", LEVELS.tobytes(), HEADER),
        (str(len(BINARY) - 1), LEVELS.tobytes(), "no JSON"),
        (str(len(BINARY) + 1), LEVELS.tobytes(), "no JSON"),
        (str(len(BINARY)), b"", "0 bytes follow"),
        (str(len(BINARY)), LEVELS.tobytes()[:-1], "95 bytes follow"),
        (str(len(BINARY)), LEVELS.tobytes() + b"\0", "97 bytes follow"),
    ],
)
def test_binary_data_that_do_not_fit_are_refused(
    client: httpx.Client, json_bytes: str | None, data: bytes, words: str
) -> None:
    headers = [] if json_bytes is None else [(HEADER, json_bytes.encode("utf-8"))]
    answer = client.post(INFER, content=BINARY + data, headers=headers)
    assert answer.status_code == 400
    assert words in error_of(answer)


def test_size_of_binary_data_is_that_of_the_shape(client: httpx.Client) -> None:
    for shape, datatype, size, words in (
        ([2, 6, 8], "UINT8", 95, "expected 96"),
        ([2, 6, 8], "FP32", 96, "expected 384"),
        ([1, 2**20, 2**20], "UINT8", 96, "expected 1099511627776"),
        ([2, 6, 8], "UINT8", "96", "binary_data_size"),
        ([2, 6, 8], "UINT8", True, "binary_data_size"),
    ):
        head = request_of(
            frames_tensor(LEVELS, shape=shape, datatype=datatype, data=..., parameters={"binary_data_size": size})
        )
        answer = post(client, head + bytes(size if type(size) is int else 96), **{HEADER: str(len(head))})
        assert answer.status_code == 400
        assert words in error_of(answer)
    body = request_of(frames_tensor(LEVELS))
    assert "follow the JSON" in error_of(post(client, body + bytes(5), **{HEADER: str(len(body))}))


def test_infinite_numbers_in_binary_are_refused(client: httpx.Client) -> None:
    for value in (math.nan, math.inf, -math.inf):
        values = np.full((1, 4, 4), 7, "<f4")
        values[0, 3, 3] = value
        head = request_of(
            frames_tensor(values, datatype="FP32", data=..., parameters={"binary_data_size": values.nbytes})
        )
        answer = post(client, head + values.tobytes(), **{HEADER: str(len(head))})
        assert answer.status_code == 400
        assert "NaN or infinity" in error_of(answer)


# Compression


@pytest.mark.parametrize("coding", ["gzip", "x-gzip", "deflate", "identity", ""])
def test_bodies_may_be_compressed(client: httpx.Client, coding: str) -> None:
    pack = {"gzip": gzip.compress, "x-gzip": gzip.compress, "deflate": zlib.compress}.get(coding, bytes)
    body = BINARY + LEVELS.tobytes()
    answer = post(client, pack(body), **{HEADER: str(len(BINARY)), "Content-Encoding": coding})
    assert answer.status_code == 200
    assert answer.json()["id"] == "one"


@pytest.mark.parametrize(
    ("coding", "body"),
    [
        ("gzip", b""),
        ("gzip", b"{}"),
        ("gzip", gzip.compress(BINARY)[:-1]),
        ("gzip", gzip.compress(BINARY)[:-9] + b"12345678"),
        ("gzip", gzip.compress(BINARY) + b"x"),
        ("gzip", gzip.compress(BINARY) + gzip.compress(BINARY)),
        ("gzip", zlib.compress(BINARY)),
        ("deflate", gzip.compress(BINARY)),
        ("deflate", zlib.compress(BINARY)[:-1]),
        ("deflate", zlib.compress(BINARY)[2:]),
    ],
)
def test_damaged_compression_is_refused(client: httpx.Client, coding: str, body: bytes) -> None:
    answer = post(client, body, Content_Encoding=coding)
    assert answer.status_code == 400
    assert coding in error_of(answer)


@pytest.mark.parametrize("coding", ["br", "gzip, gzip", "gzip, deflate", "zstd"])
def test_other_compression_is_refused(client: httpx.Client, coding: str) -> None:
    answer = post(client, b"{}", Content_Encoding=coding)
    assert answer.status_code == 415
    assert "gzip" in answer.headers["accept-encoding"]
    error_of(answer)


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress])
def test_bombs_are_refused(client: httpx.Client, pack: Any) -> None:
    bomb = pack(bytes(200 << 20))
    assert len(bomb) < LIMITS.tensor_bytes
    answer = post(client, bomb, Content_Encoding="gzip" if pack is gzip.compress else "deflate")
    assert answer.status_code == 413
    assert "inflated" in error_of(answer)


@pytest.mark.parametrize(
    ("accepted", "coding"),
    [
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("gzip, deflate", "gzip"),
        ("gzip;q=0.1, deflate;q=0.9", "deflate"),
        ("gzip;q=0, deflate;q=0", None),
        ("identity, gzip;q=0.5", None),
        ("br", None),
        ("*", "gzip"),
        ("gzip;q=x", None),
        ("", None),
    ],
)
def test_answer_has_the_coding_that_is_preferred(client: httpx.Client, accepted: str, coding: str | None) -> None:
    answer = post(client, request_of(frames_tensor(LEVELS)), Accept_Encoding=accepted)
    assert answer.headers.get("content-encoding") == coding
    assert answer.headers["vary"] == "Accept-Encoding"
    assert len(answer.json()["outputs"][0]["data"]) == 2


# Sizes


def test_large_bodies_are_refused(client: httpx.Client) -> None:
    body = bytes(LIMITS.tensor_bytes + 1)
    declared = post(client, body)
    chunked = client.post(INFER, content=(body[start : start + 5000] for start in range(0, len(body), 5000)))
    beyond_the_listener = post(client, bytes(1024 * 1024 + 1))
    json_alone = post(client, b" " * (LIMITS.tensor_json_bytes + 1))
    many_arrays = post(client, b'{"inputs":[' + b"[]," * LIMITS.tensor_arrays + b"[]]}")
    many_objects = post(client, b"[" + b"{}," * LIMITS.tensor_arrays + b"{}]")
    for answer in (declared, chunked, beyond_the_listener):
        assert answer.status_code == 413
        assert "at most" in error_of(answer)
    for answer in (json_alone, many_arrays, many_objects):
        assert answer.status_code == 413
        assert "binary" in error_of(answer)


# Anything


def json_values() -> st.SearchStrategy[Any]:
    keys = st.sampled_from(["name", "shape", "datatype", "data", "parameters", "binary_data_size", "x"])
    simple = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(NAMES)
    return st.recursive(
        simple, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=5), max_leaves=20
    )


NAMES = ["frames", "quadrants", "UINT8", "FP32", "BYTES", "label", "votes"]
TENSORS = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["frames", "quadrants"]) | json_values(),
        "datatype": st.sampled_from(["UINT8", "FP32"]) | json_values(),
        "shape": st.lists(st.integers(0, 9), min_size=2, max_size=5) | json_values(),
        "data": st.lists(st.integers(-1, 257), max_size=64) | json_values(),
        "parameters": st.fixed_dictionaries({"binary_data_size": st.integers(0, 70)}) | json_values(),
    },
)
REQUESTS = st.fixed_dictionaries(
    {"inputs": st.lists(TENSORS, max_size=2) | json_values()},
    optional={"id": json_values(), "outputs": json_values(), "parameters": json_values()},
)


def check_any(answer: httpx.Response) -> None:
    assert answer.status_code in (200, 400, 413, 422), answer.text
    if answer.status_code != 200:
        error_of(answer)


@settings(max_examples=300)
@given(request=REQUESTS, binary=st.binary(max_size=70), shift=st.integers(-2, 2))
def test_any_json_is_answered(client: httpx.Client, request: Any, binary: bytes, shift: int) -> None:
    head = json.dumps(request).encode()
    check_any(post(client, head + binary, **{HEADER: str(max(0, len(head) + shift))}))


@settings(max_examples=200)
@given(
    at=st.integers(0, len(BINARY) + LEVELS.size),
    cut=st.integers(0, 40),
    put=st.binary(max_size=20),
    length=st.none() | st.integers(0, len(BINARY) + 200),
)
def test_any_damage_of_a_binary_request_is_answered(
    client: httpx.Client, at: int, cut: int, put: bytes, length: int | None
) -> None:
    body = BINARY + LEVELS.tobytes()
    body = body[:at] + put + body[at + cut :]
    check_any(post(client, body, **({} if length is None else {HEADER: str(length)})))


@settings(max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(2, 12), st.integers(2, 12)),
    channels=st.sampled_from([None, 1, 3]),
    datatype=st.sampled_from(["UINT8", "FP32"]),
    seed=st.integers(0, 1000),
)
def test_every_form_of_a_tensor_has_the_same_answer(
    client: httpx.Client, shape: tuple[int, ...], channels: int | None, datatype: str, seed: int
) -> None:
    shape = shape if channels is None else (*shape, channels)
    levels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    values = levels.astype("<f4" if datatype == "FP32" else "u1")
    nested = post(client, request_of(frames_tensor(values, datatype=datatype)))
    flat = post(client, request_of(frames_tensor(values, datatype=datatype, data=values.ravel().tolist())))
    head = request_of(
        frames_tensor(values, datatype=datatype, data=..., parameters={"binary_data_size": values.nbytes})
    )
    binary = post(
        client, gzip.compress(head + values.tobytes()), **{HEADER: str(len(head)), "Content-Encoding": "gzip"}
    )
    assert nested.status_code == 200, nested.text
    assert nested.json() == flat.json() == binary.json()


def test_service_is_well_after_all_that(client: httpx.Client, served: Served) -> None:
    assert post(client, request_of(frames_tensor(LEVELS))).status_code == 200
    assert served.service.unready_reasons() == []
