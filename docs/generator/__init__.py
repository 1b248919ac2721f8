"""The parts of the documentation that are made when it is built: from the registries, the schema and the command line.

`hooks.py` is what mkdocs calls; see `mkdocs.yml`.
"""
