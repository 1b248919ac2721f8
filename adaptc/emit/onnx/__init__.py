"""The ONNX writer: a graph that only evaluates, lowered to what ONNX has, written weight by weight, and run."""
