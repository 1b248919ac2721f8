"""Inserting a method: one engine for each kind of method, and what the engines share (masks, positions, virtual tokens)."""
