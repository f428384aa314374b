"""ONNX graphs: export from PyTorch, the frame graph, and the rewrites of both."""
