"""The ONNX writer: a graph that only evaluates, lowered to operations that ONNX has, written a weight at a time, and run."""
