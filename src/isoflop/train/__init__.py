"""Pretraining: the loop, what is set up before it, what is saved on its way and written at its end."""
