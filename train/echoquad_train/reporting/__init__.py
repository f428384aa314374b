"""Figures, tables and HTML reports of an evaluation."""
