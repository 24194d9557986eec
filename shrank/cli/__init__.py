"""The command line: parse, call, print. It computes nothing. May import all rooms; none imports it."""
