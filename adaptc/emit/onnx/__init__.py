"""The ONNX writer: a graph lowered to ONNX's operations, written weight by weight, and run by ONNX Runtime."""
