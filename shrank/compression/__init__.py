"""Plans carried out: factors from weights and from what layers see, block by block if wanted, and `auto_fact`, which
calibrates, plans and applies. May import planning and the rooms before it.
"""
