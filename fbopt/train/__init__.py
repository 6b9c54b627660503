"""The training program: data, models, recipes, one loop, and a report. The library never needs it.

from fbopt.train.loop import train
from fbopt.train.config.options import Options
result = train(Options(data="digits", recipe="fb-penalty", steps=100))
"""
