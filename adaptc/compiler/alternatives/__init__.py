"""Adapters beside one another on one base: planned, gathered by row, swapped, added later."""
