"""Opens the destinations of a configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from echoquad_serve.config import DestinationConfig
from echoquad_serve.inference.bundle_records import BundleRecords
from echoquad_serve.inference.row_picture import draw_row
from echoquad_serve.outbox.folder_destination import FolderDestination
from echoquad_serve.outbox.webhook_destination import WebhookDestination
from echoquad_serve.records import Delivery, Destination

if TYPE_CHECKING:
    from echoquad_serve.dicom_network.commitment.reports import CommitmentReports
    from echoquad_serve.outbox.dicom_destination import DicomDestination

__all__ = ["open_destination"]


def open_destination(
    config: DestinationConfig, bundles: BundleRecords, commitments: CommitmentReports | None
) -> Destination:
    """Return a destination.

    Parameters
    ----------
    config
        Its configuration.
    bundles
        The bundles that have decided, for the reports of a DICOM node.
    commitments
        Where reports of storage commitment arrive; None without a DICOM node of one's own.

    Raises
    ------
    ConfigError
        If it cannot be used so.
    MissingExtraError
        If it needs packages that are not installed.
    """
    if config.type == "folder":
        return FolderDestination(config)
    if config.type == "webhook":
        return WebhookDestination(config)
    return _open_archive(config, bundles, commitments)


def _open_archive(
    config: DestinationConfig, bundles: BundleRecords, commitments: CommitmentReports | None
) -> DicomDestination:
    from echoquad_serve.dicom_network.store_client import StoreClient
    from echoquad_serve.outbox.dicom_destination import DicomDestination
    from echoquad_serve.reports.builder import build_reports
    from echoquad_serve.reports.report import Reports

    def build(delivery: Delivery) -> Reports:
        result, source = delivery.result, delivery.source
        if source is None or not result.rows:
            return Reports((), "no frame of the object was decided, so there is nothing to report")
        record = bundles.of(result)
        return build_reports(
            result,
            source,
            codes=record.codes,
            overlay=lambda row: draw_row(result, row, source, record.contract),
            kinds=config.reports,
        )

    client = StoreClient(
        config.host,
        config.port,
        config.ae_title,
        config.calling_ae_title,
        config.tls,
        config.timeout_s,
        config.commitment,
        commitments,
    )
    return DicomDestination(config, build, client.send)
