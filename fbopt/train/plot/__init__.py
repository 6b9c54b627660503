"""`fbopt plot`: the metrics of several runs of fbopt.train, laid over each other for print."""
