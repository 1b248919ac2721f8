"""From a model to a graph: its inputs, one export for each mode, and why a model cannot be traced.

Imports the graph and Hugging Face checkpoints. transformers is imported only where a base needs it.
"""
