"""What is read off the nodes of a graph: sites, layouts, matrix products, attentions, roles, the flow of data.

Imports `ir.nodes`, `methods` and what is below; never `ir.graph`.
"""
