"""ONNX graphs: the classifier, the frame graph, and the rewrites of both."""
