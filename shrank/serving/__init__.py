"""Plugins for servers: what of a compressed model each process of a server holds, and how the server's own layers
compute it."""
