"""The compile: from a spec to a base, its trace, a plan, the rewritten graph, a program and proved artifacts.

Imports every room below. Read `driver` first: it is the compile as a straight line.
"""
