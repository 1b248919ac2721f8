"""Writers of artifacts: torch and ONNX programs, Hugging Face directories, the manifest; all put in place at once.

Imports the graph and the rewriter. What to write, and how it is proved, is the compiler's.
"""
