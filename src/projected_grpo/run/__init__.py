"""A run on disk: its folder, saves, resuming, the columns of its steps, its summary."""
