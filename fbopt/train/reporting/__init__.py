"""What a run shows: its description, progress, curves."""
