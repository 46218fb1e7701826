"""Scaling laws: what loss a model of N parameters trained on D tokens should reach."""
