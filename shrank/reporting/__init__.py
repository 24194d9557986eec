"""Plans to look at: the HTML page and the figures. Reads plans and changes nothing. May import planning and the rooms
before it.
"""
