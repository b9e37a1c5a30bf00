"""A simulator of accelerators: descriptions in YAML, one dataflow each, over stages of work and bytes."""
