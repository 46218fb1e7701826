"""Parts of efficiency.py: its arithmetic and its page."""
