"""The factors of a compressed model, trained to do as the dense model does. May import compression and the rooms
before it.
"""
