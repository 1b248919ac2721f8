"""From a model to a graph: which inputs it takes, the export in evaluation and in training mode, and why it cannot be traced.

Imports the graph and Hugging Face checkpoints. transformers is imported only where a base needs it.
"""
