"""The report: one page on what a build holds, from its manifests alone."""
