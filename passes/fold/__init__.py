"""Constant propagation: expressions of weights alone are computed once and stored under the base's names."""
