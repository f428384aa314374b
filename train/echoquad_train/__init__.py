"""Training: data sets, recipes, networks, fitting and evaluation. The runtime defines what a frame and a vote are."""

import logging

logging.getLogger(__name__).addHandler(logging.NullHandler())
