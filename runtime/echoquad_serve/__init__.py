"""The bedside service: a bundle behind HTTP, a DICOM node and a watched folder; see `echoquad serve`.

It imports `echoquad_runtime` and nothing above it.
"""
