"""The graph: nodes, weights by name, stages and their checks, and running it one weight at a time.

Imports `methods` and `quantization`, whose objects a graph holds; neither the spec nor a tracer. `ir.analysis` reads
nodes and knows no `Graph`.
"""
