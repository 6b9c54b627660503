"""The run folder: atomic files, checkpoints, resuming, fingerprints."""
