"""What a run shows: progress, its description, curves."""
