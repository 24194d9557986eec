"""Models compressed without ever being in memory: run, calibrated and fitted block by block, from files to files, and
taken up again after whatever stopped it. May import saving and the rooms before it.
"""
