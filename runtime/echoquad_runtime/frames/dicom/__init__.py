"""DICOM files: their elements, header, codecs and pixels."""
