"""One graph in which each row of a batch has its own adapter: the graphs of all alternatives, merged."""
