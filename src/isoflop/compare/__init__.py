"""Comparison of runs: cost, final losses and scores of each, and losses at equal tokens, FLOPs and hours.

Entered by `isoflop.compare(...)` in a notebook and by `command.compare_command` from the command line.
"""

from isoflop.utils.callable_package import make_callable

make_callable(__name__, "isoflop.compare.comparison")
