"""The commands, one module or package each, named as the command; `echoquad.cli.framework.main` imports them.

A command imports what it calls inside its function, so that `--help` and the other commands do not pay for it.
"""
