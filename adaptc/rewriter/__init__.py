"""How a graph is changed: the contract of a pass, the runner that checks each, expressions spliced in and cut out.

The engines that insert a method or quantize by a scheme are here; single transformations are in `passes/`. Imports the
graph; no spec, no tracer, no checkpoint.
"""
