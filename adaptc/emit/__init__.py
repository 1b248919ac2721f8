"""Writers of artifacts: a torch program, an ONNX program, a Hugging Face directory; the manifest, and files put in place at once.

Imports the graph and the rewriter. What to write, and how it is proved, is the compiler's.
"""
