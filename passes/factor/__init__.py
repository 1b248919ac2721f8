"""Algebra: a sum or product of weights becomes a sum or chain of cheaper operations."""
