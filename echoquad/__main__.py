"""``python -m echoquad``."""

from echoquad.cli.app import main

main()
