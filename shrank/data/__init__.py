"""Data in files: texts, images and sounds, as calls of a transformers model, by the model's own processors. May import
calibration, whose batches they become, and the rooms before it.
"""
