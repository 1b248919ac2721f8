"""Sums, approximations and differences of adapters: what several do to a weight, held by one."""
