"""Decisions, before anything is changed: rank rules, budgets and their costs, which layers may change, and the plan, a
value that can be printed, edited, saved as JSON and drawn. May import calibration and the rooms before it.
"""
