"""Parts of `benchmarks/soak.py`.

disturbed: the run, its faults and what is sampled of it.  growth: slopes of memory, open files and threads; verdict and table.
"""
