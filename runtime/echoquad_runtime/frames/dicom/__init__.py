"""DICOM files: transfer syntaxes, data elements, header, codecs, pixels and frames of a file."""
