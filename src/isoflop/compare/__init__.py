"""Runs side by side: what each spent, reached and scored, and which was ahead at equal tokens, FLOPs and hours."""
