"""The runtime: from a frame's bytes to a decision. It needs numpy, Pillow and onnxruntime, and never imports torch."""

import logging

logging.getLogger(__name__).addHandler(logging.NullHandler())
