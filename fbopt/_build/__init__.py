"""Find the compiled kernels, or compile them: compilers, CUDA toolkits, ninja, the cache, wheels."""
