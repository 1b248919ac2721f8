"""Artifacts: each written to a staging folder, proved from its files, and described in a manifest."""
