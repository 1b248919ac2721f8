"""How names become classes: registries of methods, schemes, readers and passes, and what is checked when one registers.

Imports `errors` only: the tables themselves lie with their kinds (`METHODS` in `methods.method`, `PASSES` in
`rewriter.pipeline`). `calls` imports torch, and is imported late.
"""
