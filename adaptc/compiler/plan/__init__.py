"""The plan of a compile: which site gets which adapter or scheme, and by which passes. It rewrites nothing."""
