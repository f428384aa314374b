"""The container of the bedside service: the ``Containerfile``, and its health check."""
