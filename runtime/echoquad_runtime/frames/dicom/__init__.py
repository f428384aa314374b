"""DICOM files: data set, header, frame ranges, codecs and the bounds on what they announce, lookup tables, pixels."""
