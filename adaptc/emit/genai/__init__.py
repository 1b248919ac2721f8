"""What onnxruntime-genai reads: how it sees a decoder, its configuration, and the tokenizer's files."""
