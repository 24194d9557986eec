"""The torch ops `shrank::low_rank_linear`, `low_rank_gated`, `low_rank_pivoted` and `low_rank_conv`: what each is
(`linear`, `gated`, `pivoted`, `conv`), several linear layers of one input (`multi`), the way back through their ends
(`expand_backward`, `gated_backward`, `pivoted_backward`), what they refuse alike (`law`), what they mean and where they
round (`reference`, `gated_reference` and `pivoted_reference`, which are fallback and oracle), how torch ops are made of
that (`registration`), the native extension, why it cannot run (`availability`), whether it is right on this card
(`self_check`, by the problems of `probes` and the rule of `truth`, in a process of its own by `check_apart`), what was
measured (`tuned`), and who runs a call (`dispatch`). Imports nothing of shrank but `util`.
"""
