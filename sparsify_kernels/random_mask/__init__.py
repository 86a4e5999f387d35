"""Keep a random subset of the units of each sample, drawn by a counter-based generator."""
