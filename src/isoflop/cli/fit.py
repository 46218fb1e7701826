"""`isoflop fit`: fit scaling laws to measured runs."""

from __future__ import annotations

from isoflop.cli.parser import Parser

DESCRIPTION = """\
Fit scaling laws to measured runs: one CSV, Parquet or JSON table of sizes,
tokens or FLOPs, and losses; or run folders, or folders that hold such. Where
runs of the same size and tokens differ in learning rate or batch, the best of
them follow from the size too.

  isoflop fit runs/sweep --out law.json --predict 1e21
"""


def main(arguments: list[str], prog: str) -> int:
    """Parse before scipy is imported. Returns the exit code."""
    parser = Parser(prog=prog, description=DESCRIPTION)
    parser.add_argument("runs", nargs="+", help="one table, or folders of runs")
    parser.add_argument("--out", metavar="FILE", help="write the law, with figure, page and numbers (default: print only)")
    parser.add_argument(
        "--hyperparameters",
        action="store_true",
        help="fit laws of learning rate and batch alone (default: also, where these vary)",
    )
    parser.add_argument("--json", action="store_true", help="print the numbers at full precision")
    parser.add_argument(
        "--predict", nargs="+", type=float, default=[], metavar="C", help="FLOPs to predict at (default: 10 x the largest budget)"
    )
    parser.add_argument("--resamples", type=int, default=1000, metavar="N", help="resamples of the bootstrap")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed of the bootstrap")
    parser.add_argument(
        "--asymmetry", type=float, default=0.5, metavar="W", help="weight of losses above the law; those below get 1 - W"
    )
    parser.add_argument("--delta", type=float, default=1e-3, help="threshold of the Huber loss, in log loss")
    parser.add_argument("--figures", metavar="DIR", help="folder of figure, page and numbers (default: beside --out)")
    table = parser.add_argument_group("the table's columns (default: recognized by their names)")
    for name, quantity in (
        ("parameters", "N"),
        ("tokens", "D"),
        ("flops", "C"),
        ("loss-column", "the loss, nats per token"),
        ("learning-rate", "the peak learning rate"),
        ("batch", "tokens per step, or sequences per step with --sequence-length"),
    ):
        table.add_argument(f"--{name}", metavar="COLUMN", help=f"column of {quantity}")
    table.add_argument("--sequence-length", type=int, metavar="TOKENS", help="tokens of a sequence, if batches are in sequences")
    table.add_argument("--where", nargs="+", default=[], metavar="COLUMN=VALUE", help="use only the rows with these values")
    given = parser.parse_args(arguments)

    from isoflop.scaling.fit import fit_command
    from isoflop.scaling.options import FitOptions

    values = vars(given) | {"runs": tuple(given.runs), "predict": tuple(given.predict), "where": tuple(given.where)}
    return fit_command(FitOptions(as_json=values.pop("json"), loss=values.pop("loss_column"), **values))
