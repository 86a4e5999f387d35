"""Pick the key tokens of each sample by the interquartile range of its scores; gather tokens by index."""
