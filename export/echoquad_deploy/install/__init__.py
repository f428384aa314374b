"""The installers that every stick carries, as package data: ``install.sh`` (Linux) and ``install.ps1`` (Windows)."""
