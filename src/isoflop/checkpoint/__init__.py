"""Checkpoints: whole or not there, written while training goes on, loaded by any engine at any world size.

folder: which are there, which are whole, which to keep.  state: the tensors of a run by their own names, for every engine.
saver: writes them in the background.
"""
