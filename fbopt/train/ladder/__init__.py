"""`fbopt ladder`: several recipes and seeds, side by side."""
