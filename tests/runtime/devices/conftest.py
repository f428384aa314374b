"""Fixtures for the tests of devices."""

from __future__ import annotations

import pytest

from echoquad_runtime.devices.cuda_probe import cuda_unavailable_reason


@pytest.fixture(scope="module")
def unavailable_reason() -> str | None:
    """Return why CUDA is not available on this machine; None if it is."""
    return cuda_unavailable_reason()


@pytest.fixture
def no_cuda(unavailable_reason: str | None) -> str:
    """Return why CUDA is not available; skip the test if it is."""
    if unavailable_reason is None:
        pytest.skip("CUDA works here")
    return unavailable_reason
