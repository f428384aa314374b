"""A DICOM node as destination: builds the objects of a result, and stores them there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from echoquad_runtime.errors import EchoQuadError
from echoquad_serve.config import DestinationConfig
from echoquad_serve.errors import DeliveryError, DeliveryRefusedError
from echoquad_serve.records import Delivery
from echoquad_serve.reports.report import Reports

__all__ = ["DicomDestination"]

logger = logging.getLogger(__name__)


class DicomDestination:
    """Stores reports of results in a DICOM node.

    Parameters
    ----------
    config
        The destination's configuration.
    build
        Returns the reports of a result. The same result must give the same reports, so that a repeat changes nothing at
        the node.
    send
        Stores objects in the node. It raises a `DeliveryError` unless the node has all of them.

    Attributes
    ----------
    note
        What the latest delivery lacked, and why, such as a structured report; empty if nothing.
    """

    def __init__(
        self,
        config: DestinationConfig,
        build: Callable[[Delivery], Reports],
        send: Callable[[Sequence[bytes]], None],
    ) -> None:
        self._name, self._build, self._send = config.name, build, send
        self.note = ""

    @property
    def name(self) -> str:
        """Name from the configuration."""
        return self._name

    def deliver(self, delivery: Delivery) -> None:
        """Build the objects of a result and store them in the node.

        A result of the live source has no study, and nothing is sent.

        Raises
        ------
        DeliveryRefusedError
            If the object that the result is about is not kept any more, or no report can be made of the result.
        DeliveryError
            If the node has not stored all objects.
        """
        if delivery.result.origin == "live":
            return
        if delivery.source is None or not delivery.source.exists():
            raise DeliveryRefusedError(
                "the object of the result is not kept any more, and a report needs it; send the object again"
            )
        try:
            made = self._build(delivery)
        except DeliveryError:
            raise
        except EchoQuadError as error:  # the result is the same at the next attempt, unless a file cannot be read now
            kind = DeliveryError if isinstance(error, OSError) else DeliveryRefusedError
            raise kind(f"no report can be made of the result: {error}") from error
        if made.reason and made.reason != self.note:
            logger.warning("a report is not complete; /api/v1/status says why", extra={"destination": self._name})
        self.note = made.reason
        if made.reports:
            self._send([report.data for report in made.reports])

    def close(self) -> None:
        """Release nothing: connections are those of `send`."""
