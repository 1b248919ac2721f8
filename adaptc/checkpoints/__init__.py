"""Adapters and Hugging Face models on disk: read, matched with a graph, written.

Imports the graph, for the names its tensors have there; no spec and no pass.
"""
