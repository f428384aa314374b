"""The command line: `framework` runs commands and prints; `commands` contains the commands."""
