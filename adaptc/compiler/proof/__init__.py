"""Proofs: the inputs they run on, the sides that are compared, and what is said of the difference."""
