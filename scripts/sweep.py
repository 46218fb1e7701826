"""Train the runs of a sweep and fit their law: python scripts/sweep.py recipes/sweeps/laptop.yaml [--dry-run].

Each run is an ordinary recipe in a folder of its own. Killed, the same command goes on and redoes nothing.
"""

import argparse
import sys

from isoflop.errors import run_command


def main(argv: list[str] | None = None) -> int:
    """Parse first: a mistake costs no import of the libraries behind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", help="a YAML file of recipes/sweeps/")
    parser.add_argument("--config", default="accelerate_configs/cpu.yaml", help="how each run is launched")
    parser.add_argument("--gpus", nargs="+", default=[], metavar="N", help="pack the runs over these GPUs of this machine")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time without GPUs, each with its share of the cores")
    parser.add_argument("--slurm", metavar="FILE", help="write a Slurm job array of the sweep, and train nothing")
    parser.add_argument("--only", type=int, metavar="N", help="the N-th group of runs alone, as a job array's tasks do")
    parser.add_argument("--dry-run", action="store_true", help="what has run, what is left and for how long; train nothing")
    parser.add_argument(
        "--target", type=float, metavar="C", help="write the recipe of a run at C FLOPs, by the rules and the law"
    )
    parser.add_argument("--json", action="store_true", help="the table as numbers")
    given = parser.parse_args(argv)

    from isoflop.sweep.command import Request, sweep_command

    where = (given.config, tuple(given.gpus), given.jobs)
    return sweep_command(Request(given.sweep, *where, given.only, given.slurm, given.dry_run, given.json, given.target))


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
