"""`fbopt analyze`: fbopt.analysis on the runs of fbopt.train. The library never imports it."""
