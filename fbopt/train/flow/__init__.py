"""`fbopt flow`: a gradient, stable or central flow beside a run of plain gradient descent."""
