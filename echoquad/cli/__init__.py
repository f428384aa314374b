"""The command line. A module a command: each parses, calls, and prints; what it calls is imported when it runs."""
