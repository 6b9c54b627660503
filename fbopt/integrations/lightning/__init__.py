"""Lightning: batches weighed by samples or tokens, and one step over all batches per epoch."""

from fbopt.integrations.lightning.accumulation import WeightedAccumulation
from fbopt.integrations.lightning.full_batch import FullBatchLoop

__all__ = ["FullBatchLoop", "WeightedAccumulation"]
