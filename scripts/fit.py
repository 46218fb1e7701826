"""Fit scaling laws to measured runs: python scripts/fit.py RUNS... [--out law.json] [--predict 1e21 ...].

RUNS is one CSV, Parquet or JSON table of sizes, tokens or FLOPs, and losses; or folders of runs, or folders that hold such.
"""

import argparse
import sys

from isoflop.errors import run_command


def main(argv: list[str] | None = None) -> int:
    """Parse first: a mistake costs no import of the libraries behind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="one table, or folders of runs")
    parser.add_argument("--out", metavar="FILE", help="write the law, and figure, page and numbers beside it; else only print")
    parser.add_argument("--json", action="store_true", help="print the numbers at full precision")
    parser.add_argument(
        "--predict", nargs="+", type=float, default=[], metavar="C", help="in FLOPs; else 10 x the largest budget"
    )
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--asymmetry", type=float, default=0.5, help="weight of losses above the law; below it: 1 - this")
    parser.add_argument("--delta", type=float, default=1e-3, help="of the Huber loss, in log loss")
    parser.add_argument("--figures", metavar="DIR", help="where figure, page and numbers go")
    for name, of in (("parameters", "N"), ("tokens", "D"), ("flops", "C"), ("loss-column", "losses")):
        parser.add_argument(f"--{name}", metavar="COLUMN", help=f"the table's column of {of}")
    parser.add_argument("--where", nargs="+", default=[], metavar="COLUMN=VALUE", help="the table's rows that have these")
    given = parser.parse_args(argv)

    from isoflop.fit.command import Request, fit_command
    from isoflop.fit.table import Selection

    selection = Selection(given.parameters, given.tokens, given.flops, given.loss_column, tuple(given.where))
    bootstrap, objective = (given.resamples, given.seed), (given.asymmetry, given.delta)
    request = Request(
        tuple(given.runs), given.out, given.json, tuple(given.predict), *bootstrap, *objective, given.figures, selection
    )
    return fit_command(request)


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
