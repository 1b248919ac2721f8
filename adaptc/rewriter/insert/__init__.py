"""Inserting a method: one engine for each kind of method, and what they share (masks, positions, virtual tokens)."""
