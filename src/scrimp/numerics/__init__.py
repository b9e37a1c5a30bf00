"""How numbers are kept in few bits: rounding, groups with a scale, packing, codebooks."""
