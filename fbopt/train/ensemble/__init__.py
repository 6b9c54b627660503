"""Many small networks trained at once in one process: the same options but for seed and numbers.

K networks of one architecture are rows of a (K, P) tensor of parameters; `torch.func.vmap` takes
them through the model together. Each has a run folder as if it had been trained alone.
"""
