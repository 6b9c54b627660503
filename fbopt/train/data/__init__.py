"""Data sets on the training device: loading, chunks, augmentation, random draws."""
