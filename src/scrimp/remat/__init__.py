"""Rematerialization of a chain of blocks: what running them costs, schedules, solvers, and what executes them."""
