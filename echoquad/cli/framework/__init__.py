"""Shared by all commands: application, options, console output, signals and checks for optional packages."""
