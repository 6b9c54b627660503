"""The checks of fbopt.check: each compares what a closure computes with what it should."""
