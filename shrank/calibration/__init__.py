"""Data in, moments out: batches of anything that a model takes, the masks that say what counts, losses and their
gradients, and the second moments of what every layer sees. May import model and the rooms before it.
"""
