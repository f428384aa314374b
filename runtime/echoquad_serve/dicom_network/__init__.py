"""DICOM networking: the node that receives objects, and the client that stores results in an archive."""

from echoquad_serve.dicom_network.commitment.reports import CommitmentReports
from echoquad_serve.dicom_network.node import DicomNode
from echoquad_serve.dicom_network.store_client import StoreClient

__all__ = ["CommitmentReports", "DicomNode", "StoreClient"]
