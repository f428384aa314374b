"""Run the command line with ``python -m echoquad``."""

from echoquad.cli.framework.main import main

main()
