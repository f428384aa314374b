"""The KServe v2 protocol (Open Inference Protocol) below ``/v2``: tensors in, tensors out, as JSON or binary."""

from echoquad_serve.http.kserve.routes import kserve_routes

__all__ = ["kserve_routes"]
