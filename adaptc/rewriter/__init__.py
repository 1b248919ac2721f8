"""How a graph is changed: the contract of a pass, the runner that checks each, expressions spliced in and cut out.

The engines that insert a method or quantize by a scheme are here; single transformations are in `passes/`. Imports the
graph, but no spec, no tracer and no checkpoint.
"""
