"""``echoquad audit``: check the audit log of the service."""
