"""Constant propagation: what holds weights only is computed once and stored under the base's name."""
