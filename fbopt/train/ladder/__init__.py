"""`fbopt ladder`: several recipes and seeds, trained side by side and compared."""

from fbopt.train.ladder.plan import Ladder, Plan, make_plan

__all__ = ["Ladder", "Plan", "make_plan"]
