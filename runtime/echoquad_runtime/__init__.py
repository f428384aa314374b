"""The runtime: what a frame is, and how it becomes a decision. Needs numpy, Pillow and onnxruntime; never torch."""
