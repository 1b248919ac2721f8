"""How a matrix is stored in few bits: schemes, their layouts, other libraries' packing, and operations on them.

All that a file of `passes/quantize/` or `passes/stored/` needs. Imports `methods` for the sites a scheme can sit on.
"""
