"""`fbopt ladder`: several recipes and seeds, trained side by side and compared."""
