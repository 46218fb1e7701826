"""Sweep: many small runs of one design, each an ordinary recipe in a folder of its own, and the law they give."""
