"""The two torch ops, `shrank::low_rank_linear` and `shrank::low_rank_conv`: what each is (`linear`, `conv`), what they
refuse alike (`law`), what they mean and where they round (`reference`, which is fallback and oracle), how torch ops are
made of that (`registration`), the native extension, why it cannot run (`availability`), and who runs a call
(`dispatch`). Imports nothing of shrank.
"""
