"""Scaling laws from measured runs: a table or run folders in; a law file, a report and figures out."""
