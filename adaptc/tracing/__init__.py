"""From a model to a graph: its inputs, the export in evaluation and training mode, and why it cannot be traced.

Imports the graph and Hugging Face checkpoints. transformers is imported only where a base needs it.
"""
