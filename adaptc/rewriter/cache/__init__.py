"""A graph on its last tokens alone: the engine of the pass `cache`. Imports what the rewriter does."""
