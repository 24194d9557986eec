"""Files, written and loaded again: checkpoints of shrank, and the ways of transformers, diffusers, safetensors, the
hub and sentence-transformers, each told of low-rank layers when it is imported. What could not be loaded again is
refused before it is written. May import healing and the rooms before it.
"""
