"""Export: components written as ONNX, checked against the PyTorch they came from, and built by TensorRT.

The process that builds engines imports this package and has neither torch nor onnx: nothing is imported here.
"""
