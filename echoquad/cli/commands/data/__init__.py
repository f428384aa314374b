"""``echoquad data``: check data sets and create them, one module for each subcommand."""
