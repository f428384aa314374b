"""NVIDIA's client, unchanged, against a real server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest
from real_server import Served

from echoquad_runtime._version import __version__
from echoquad_runtime.predict.prediction import Prediction
from echoquad_runtime.quadrants import frame_quadrants

triton = pytest.importorskip("tritonclient.http")
InferenceServerException = pytest.importorskip("tritonclient.utils").InferenceServerException


@pytest.fixture
def client(served: Served) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(served.address, concurrency=4) as client:
        yield client


@pytest.fixture
def model(served: Served) -> str:
    return served.service.info()["bundle"]["name"]


def frames_input(frames: np.ndarray, *, binary: bool = True, datatype: str = "UINT8") -> triton.InferInput:
    tensor = triton.InferInput("frames", list(frames.shape), datatype)
    tensor.set_data_from_numpy(frames, binary_data=binary)
    return tensor


def expected_of(served: Served, frames: np.ndarray) -> list[Prediction]:
    return [one for one in served.service.predictor().predict_frames(frames) if isinstance(one, Prediction)]


def check(result: triton.InferResult, expected: list[Prediction]) -> None:
    assert [label.decode() for label in result.as_numpy("label").astype(bytes)] == [one.label for one in expected]
    assert result.as_numpy("probabilities").dtype == np.float32
    np.testing.assert_array_equal(
        result.as_numpy("probabilities"), np.array([one.probabilities for one in expected], np.float32)
    )
    np.testing.assert_array_equal(
        result.as_numpy("quadrant_probabilities"),
        np.array([one.quadrant_probabilities for one in expected], np.float32),
    )
    votes = [[one.quadrant_labels.count(name) for name in one.classes] for one in expected]
    assert result.as_numpy("votes").tolist() == votes
    assert result.as_numpy("abstained").tolist() == [False] * len(expected)


def test_client_asks_for_health(client: triton.InferenceServerClient, model: str, served: Served) -> None:
    version = served.service.info()["bundle"]["sha256"][:12]
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(model)
    assert client.is_model_ready(model, version)
    assert not client.is_model_ready("other")
    assert not client.is_model_ready(model, "0")


def test_client_reads_metadata(client: triton.InferenceServerClient, model: str, served: Served) -> None:
    server = client.get_server_metadata()
    assert server == {"name": "echoquad", "version": __version__, "extensions": ["binary_tensor_data"]}
    metadata = client.get_model_metadata(model)
    assert metadata["name"] == model
    assert metadata["versions"] == [served.service.info()["bundle"]["sha256"][:12]]
    assert metadata["inputs"][0] == {"name": "frames", "datatype": "UINT8", "shape": [-1, -1, -1]}
    assert metadata["inputs"][1] == {"name": "quadrants", "datatype": "UINT8", "shape": [-1, 4, 1, 32, 32]}
    assert metadata["properties"]["classes"] == '["ASD", "NORM"]'
    outputs = {output["name"]: output for output in metadata["outputs"]}
    assert outputs["probabilities"]["shape"] == [-1, 2]
    assert outputs["quadrant_probabilities"]["shape"] == [-1, 4, 2]


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("request_compression", [None, "gzip", "deflate"])
@pytest.mark.parametrize("response_compression", [None, "gzip", "deflate"])
def test_frames_as_binary_and_json_with_every_compression(
    client: triton.InferenceServerClient,
    model: str,
    served: Served,
    frames: np.ndarray,
    binary_in: bool,
    request_compression: str | None,
    response_compression: str | None,
) -> None:
    result = client.infer(
        model,
        [frames_input(frames, binary=binary_in)],
        request_id="request 1",
        request_compression_algorithm=request_compression,
        response_compression_algorithm=response_compression,
    )
    check(result, expected_of(served, frames))
    answer = result.get_response()
    assert answer["id"] == "request 1"
    assert answer["model_name"] == model
    assert answer["parameters"]["bundle_sha256"].startswith(answer["model_version"])
    assert all("binary_data_size" in output["parameters"] for output in answer["outputs"])


def test_metadata_describe_what_is_answered(
    client: triton.InferenceServerClient, model: str, frames: np.ndarray
) -> None:
    described = client.get_model_metadata(model)["outputs"]
    found = client.infer(model, [frames_input(frames)]).get_response()["outputs"]
    assert [output["name"] for output in found] == [output["name"] for output in described]
    for output, description in zip(found, described, strict=True):
        assert output["datatype"] == description["datatype"]
        assert output["shape"] == [len(frames), *description["shape"][1:]]


def test_outputs_are_filtered_and_each_has_its_own_form(
    client: triton.InferenceServerClient, model: str, served: Served, frames: np.ndarray
) -> None:
    wanted = [
        triton.InferRequestedOutput("quadrant_labels", binary_data=True),
        triton.InferRequestedOutput("probabilities", binary_data=False),
        triton.InferRequestedOutput("label", binary_data=False),
        triton.InferRequestedOutput("confidence", binary_data=True),
    ]
    result = client.infer(model, [frames_input(frames)], outputs=wanted)
    assert [output["name"] for output in result.get_response()["outputs"]] == [output.name() for output in wanted]
    expected = expected_of(served, frames)
    labels = [[label.decode() for label in row] for row in result.as_numpy("quadrant_labels")]
    assert labels == [list(one.quadrant_labels) for one in expected]
    assert result.get_output("label")["data"] == [one.label for one in expected]
    np.testing.assert_allclose(result.as_numpy("probabilities"), [one.probabilities for one in expected], rtol=1e-6)
    contract = served.service.predictor().contract
    np.testing.assert_allclose(result.as_numpy("confidence"), [one.confidence(contract) for one in expected], rtol=1e-6)
    assert result.as_numpy("votes") is None


def test_quadrants_decide_as_the_frames_they_are_cut_from(
    client: triton.InferenceServerClient, model: str, served: Served, frames: np.ndarray
) -> None:
    contract = served.service.predictor().contract
    quadrants = np.stack([frame_quadrants(frame, contract) for frame in frames])
    for datatype in ("UINT8", "FP32"):
        for binary in (True, False):
            part = quadrants[: 3 if binary else 1]
            values = part if datatype == "UINT8" else part.astype(np.float32)
            tensor = triton.InferInput("quadrants", list(values.shape), datatype)
            tensor.set_data_from_numpy(values, binary_data=binary)
            check(client.infer(model, [tensor]), expected_of(served, frames)[: len(part)])


def test_asynchronous_requests_have_their_own_answers(
    client: triton.InferenceServerClient, model: str, served: Served, frames: np.ndarray
) -> None:
    pending = [
        client.async_infer(model, [frames_input(frame[None])], request_id=str(number))
        for number, frame in enumerate(frames)
    ]
    for number, (answer, expected) in enumerate(zip(pending, expected_of(served, frames), strict=True)):
        result = answer.get_result(timeout=20)
        assert result.get_response()["id"] == str(number)
        check(result, [expected])


def test_asyncio_client_gets_the_same_answers(served: Served, model: str, frames: np.ndarray) -> None:
    aio = pytest.importorskip("tritonclient.http.aio", reason="needs aiohttp")

    async def ask() -> list[triton.InferResult]:
        async with aio.InferenceServerClient(served.address) as client:
            assert await client.is_model_ready(model)
            tensor = aio.InferInput("frames", list(frames.shape), "UINT8").set_data_from_numpy(frames)
            codings = (None, "gzip", "deflate")
            requests = [
                client.infer(model, [tensor], request_compression_algorithm=one, response_compression_algorithm=other)
                for one, other in zip(codings, codings[::-1], strict=True)
            ]
            return await asyncio.gather(*requests)

    for result in asyncio.run(ask()):
        check(result, expected_of(served, frames))


def test_any_bundle_answers_to_the_name_of_the_program(
    client: triton.InferenceServerClient, served: Served, frames: np.ndarray
) -> None:
    assert client.is_model_ready("echoquad")
    result = client.infer("echoquad", [frames_input(frames)])
    check(result, expected_of(served, frames))
    assert result.get_response()["model_name"] == "echoquad"
    assert result.get_response()["parameters"]["bundle"] == served.service.info()["bundle"]["name"]


def test_errors_arrive_as_exceptions_with_status_and_one_line(
    client: triton.InferenceServerClient, model: str, frames: np.ndarray
) -> None:
    def fault(status: str, name: str, tensor: triton.InferInput, **options: object) -> str:
        with pytest.raises(InferenceServerException) as caught:
            client.infer(name, [tensor], **options)
        assert caught.value.status() == status
        message = caught.value.message()
        assert message.isprintable()
        return message

    good = frames_input(frames)
    assert "other" in fault("404", "other", good)
    assert "version" in fault("404", model, good, model_version="7")
    output = triton.InferRequestedOutput("logits")
    assert "probabilities" in fault("400", model, good, outputs=[output])
    assert "INT64" in fault("400", model, frames_input(frames.astype(np.int64), datatype="INT64"))
    bad = frames.astype(np.float32)
    bad[1, 2, 3] = np.nan
    assert "NaN" in fault("400", model, frames_input(bad, datatype="FP32"))
    assert "not normalised" in fault("400", model, frames_input(frames.astype(np.float32) / 255, datatype="FP32"))
    assert "at most 8" in fault("400", model, frames_input(np.zeros((9, 8, 8), np.uint8)))
    assert "too large" in fault("413", model, frames_input(np.zeros((1, 600, 600), np.uint8)))
    classified = triton.InferRequestedOutput("probabilities", class_count=1)
    assert "classification" in fault("400", model, good, outputs=[classified])
    tensor = triton.InferInput("frames", [3, 60, 80], "UINT8")
    tensor.set_shared_memory("region", 14400)
    assert "shared memory" in fault("400", model, tensor)
    assert "frame 1 of 2" in fault("422", model, frames_input(np.zeros((2, 1, 5), np.uint8)))
    with pytest.raises(InferenceServerException) as caught:
        client.get_model_config(model)
    assert caught.value.status() == "404"
