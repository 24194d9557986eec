"""The two torch ops, `shrank::low_rank_linear` and `shrank::low_rank_conv`: their law, what they mean and where they
round (`reference`, which is fallback and oracle), their registration, the native extension, and who runs a call
(`dispatch`). Imports nothing of shrank.
"""
