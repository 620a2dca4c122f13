"""A run in its folder: its settings, its stages, and what each left."""
