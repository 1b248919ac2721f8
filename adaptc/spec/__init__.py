"""The language of specs: YAML with the line and column of every value, its validation, and the entries it may have.

Knows no model and no graph. Imports the registries of `methods` and `quantization` for the names a spec may use.
"""
