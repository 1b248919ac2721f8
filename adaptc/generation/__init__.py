"""Texts from a decoder, token by token: directories of onnxruntime-genai, and ONNX programs with a cache."""
