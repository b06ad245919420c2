"""How good are the samples: distances and accuracies against real images.

``frechet`` works on any features; ``quality`` is the value every metric reports itself in. What
belongs to one data set lives in files named for it (``digit_*``), so that others come beside them.
"""
