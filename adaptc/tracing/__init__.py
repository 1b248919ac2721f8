"""Where a base comes from, and how it becomes a graph without its weights."""
