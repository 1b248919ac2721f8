"""What an adaptation method states: its parameters, its expression, where it can sit, how PEFT spells it.

All that a file of `passes/insert/` needs. Imports `errors`, `patterns`, `registry`; no graph, and no torch before a
method computes.
"""
