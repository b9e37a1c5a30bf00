"""Techniques: one folder a section of the survey, one file a technique."""
