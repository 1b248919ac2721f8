"""The ONNX writer: a graph that only evaluates, lowered to operations that ONNX has, written weight by weight, and run."""
