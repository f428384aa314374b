"""The queue on the disk: accepted objects, their results, and the outbox of what destinations do not have yet."""

from echoquad_serve.queue.job_store import JobStore

__all__ = ["JobStore"]
