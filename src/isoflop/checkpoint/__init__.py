"""Checkpoints: complete or absent, written while training continues, loaded by any engine at any world size.

manager: `CheckpointManager`, what training uses.  folder: listing, verification, retention.  state: a run's tensors under names
that no engine changes.  saver: writes them in the background.
"""
