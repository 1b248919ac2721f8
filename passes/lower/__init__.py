"""Lowering: what an operation of several nodes is computed by at once, where something computes it better."""
