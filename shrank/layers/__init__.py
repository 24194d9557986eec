"""LED and CED, the low-rank twins of linear and convolution layers, as modules: their two stages and who computes them,
the dense weight that they stand for, pivots, and what other tools may have made of a stage. May import linalg and ops.
"""
