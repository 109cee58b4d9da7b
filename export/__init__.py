"""Export: components written as ONNX and checked against the PyTorch they came from."""
