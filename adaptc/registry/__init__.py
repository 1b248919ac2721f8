"""Registries: the classes that a spec calls by name, and the checks each must pass when it registers.

Imports `errors` only. The registries themselves are defined next to the class they hold (`METHODS` in
`methods.method`, `PASSES` in `rewriter.pipeline`). `calls` imports torch, so it is imported late.
"""
