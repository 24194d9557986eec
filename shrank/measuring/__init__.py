"""What compressing did and what it costs: errors of layers, language models, throughput and memory, times of layers,
and which kernel a layer takes on which GPU. May import saving and the rooms before it.
"""
