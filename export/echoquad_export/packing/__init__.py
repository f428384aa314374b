"""The bundle: made beside its target, checked, and moved into place."""
