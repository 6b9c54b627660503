"""Every kernel in plain torch, under the name that users import: see fbopt/_ops/reference.py."""

from fbopt._ops.reference import *  # noqa: F403
