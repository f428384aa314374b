"""Devices: loading onnxruntime, its execution providers, probes that compute, and inference sessions."""
