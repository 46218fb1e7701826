"""Parts of `benchmarks/gpu.py`.

runner: run a part in a process of its own, with limits.  worker: that process.  cases: what all parts share.
correct, runs; memory; speed, kernels; rate: the parts.  results: the file of rows, and lines about them.
"""
