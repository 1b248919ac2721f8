"""Algebra: a matrix product with an expression of weights becomes a sum or chain of cheaper operations."""
