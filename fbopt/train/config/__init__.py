"""Options, recipes and their resolution. Nothing here imports torch."""
