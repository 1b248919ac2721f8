"""The driver: spec, base, trace, plan, rewrite, program, artifacts, each proved.

Imports every room below. `driver` is the straight line to read first.
"""
