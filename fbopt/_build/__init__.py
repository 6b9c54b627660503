"""Find the compiled kernels, or compile them: compilers, CUDA toolkits, ninja, cache, wheels."""
