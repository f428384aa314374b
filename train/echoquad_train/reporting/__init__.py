"""Reporting: the figures, tables and HTML reports of an evaluation or of a comparison of two."""
