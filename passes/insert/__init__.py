"""Adaptation methods, one a file: each says what a weight becomes, and nothing else."""
