"""Quantization schemes, one a file."""
