"""Models: one Transformer with options, its presets, and Hugging Face folders in and out."""
