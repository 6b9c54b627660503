"""The kernels as the library calls them: dispatch, reference, flat buffers, exact sums."""
