"""One step of a closure: gradients of chunks, perturbation, BatchNorm, reduction, CUDA graphs."""
