"""`isoflop sweep`: train the runs of a sweep and fit their law."""

from __future__ import annotations

from isoflop.cli.parser import Parser

DESCRIPTION = """\
Train the runs of a sweep and fit a scaling law to them. Each run is an
ordinary recipe in a folder of its own. The same command resumes after a kill
and repeats nothing.

  isoflop sweep sweeps/laptop --dry-run
"""


def main(arguments: list[str], prog: str) -> int:
    """Parse before anything heavy is imported. Returns the exit code."""
    parser = Parser(prog=prog, description=DESCRIPTION)
    parser.add_argument("sweep", help="a YAML file, or the name of a shipped one: sweeps/laptop")
    parser.add_argument(
        "--launch", "--config", dest="config", metavar="CONFIG", default="cpu", help="launch config of each run, a name or a path"
    )
    parser.add_argument("--gpus", nargs="+", default=[], metavar="INDEX", help="train one run at a time on each of these GPUs")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time without GPUs, which share the cores")
    parser.add_argument("--slurm", metavar="FILE", help="write a Slurm job array of the sweep, and train nothing")
    parser.add_argument("--only", type=int, metavar="N", help="train the N-th group of runs alone, as a job array's task does")
    parser.add_argument("--dry-run", action="store_true", help="print what is finished and what is left, in hours; train nothing")
    parser.add_argument("--target", type=float, metavar="C", help="write the recipe of a run at C FLOPs by the law")
    parser.add_argument("--json", action="store_true", help="print the table as numbers")
    given = parser.parse_args(arguments)

    from isoflop.sweep.command import SweepOptions, sweep_command

    where = (given.config, tuple(given.gpus), given.jobs)
    return sweep_command(SweepOptions(given.sweep, *where, given.only, given.slurm, given.dry_run, given.json, given.target))
