"""Adapters that a program takes as inputs: their one form, and where it goes in a graph."""
