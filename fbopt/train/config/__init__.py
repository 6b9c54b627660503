"""Options, recipes, and the command lines made from them; nothing here imports torch."""
