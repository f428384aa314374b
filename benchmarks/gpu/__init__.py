"""Sections of the GPU benchmark, the processes they run in, and their report."""
