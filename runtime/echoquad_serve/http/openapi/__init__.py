"""The OpenAPI description of the API."""

from echoquad_serve.http.openapi.document import openapi_document

__all__ = ["openapi_document"]
