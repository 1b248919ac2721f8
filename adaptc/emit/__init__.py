"""Writers of artifacts: torch and ONNX programs, Hugging Face directories, the manifest; all put in place together.

Imports the graph and the rewriter. The compiler decides what to write, and proves it.
"""
