"""Cuts of a checkpoint: X.py plans without torch, X_fit.py fits with it."""
