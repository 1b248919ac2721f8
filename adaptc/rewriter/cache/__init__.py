"""The cache: a decoder's graph, run on new tokens alone, with the keys and values of the past.

Imports `ir` and the contract of a pass.
"""
