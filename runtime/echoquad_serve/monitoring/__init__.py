"""Metrics, logs without patient values, the audit log, and drift of what the service sees."""
