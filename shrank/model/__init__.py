"""A user's model, read and changed: which layers can become low-rank and how (`adapters`, one class for each layer
type), where a model keeps its modules, the one walk and the only place that changes it (`surgery`), hooks on running
models, the way back to dense layers, and LoRA beside low-rank ones. May import layers and what those may.
"""
