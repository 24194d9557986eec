"""What any program needs and none of it knows of models: files that are written whole or not at all, tensors in files,
progress, work in parallel, nested values and their fingerprints, names that were mistyped. Imports nothing of shrank.
"""
