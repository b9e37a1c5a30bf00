"""Data: documents become a memory-mapped stream of tokens; batch i is a function of (seed, i)."""
