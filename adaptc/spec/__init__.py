"""The YAML language of specs: text, places in it, validation, entries.

Knows no model and no graph. Imports the registries of `methods` and `quantization` for the names a spec may use.
"""
