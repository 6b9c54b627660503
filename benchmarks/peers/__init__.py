"""The penalised step of `benchmarks.step --peers`: fbopt, plain torch and JAX on the same work.

Workers, each a process with its own cores and threads, are asked for one call at a time, so that
all contenders take turns in one run and nobody else is at work meanwhile.
"""
