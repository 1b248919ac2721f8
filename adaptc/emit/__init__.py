"""What comes out: a trainable torch artifact, an ONNX program, an adapter's checkpoint; all written atomically."""
