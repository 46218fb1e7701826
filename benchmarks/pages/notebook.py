"""docs/notebook.ipynb: from a budget to a trained toy model to a fitted law.

`python benchmarks/pages/notebook.py` runs the cells below in this process, in a temporary folder, and writes the notebook with
their outputs.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import io
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[2] / "docs"
# Runs of the sweep `sweeps/laptop`: 25 minutes on two cores, too long for a notebook.
ROW = re.compile(r"^\| c[\d.e+]+_n\d+ \| [^|]+ \| ([\d,]+) \| ([\d,]+) \|.*\| ([\d.]+) \|$", re.MULTILINE)


def measured_runs() -> str:
    """Return the N, D and loss of the sweep's runs, from docs/circle.md, as Python."""
    rows = ROW.findall((HERE / "circle.md").read_text(encoding="utf-8"))
    lines = [f"    ({n.replace(',', '_')}, {d.replace(',', '_')}, {loss})," for n, d, loss in rows]
    return "\n".join(["runs = pandas.DataFrame([", *lines, '], columns=["parameters", "tokens", "loss"])'])


CELLS = """\
# %% [markdown]
# From a budget to a trained model to a law

On a laptop, in about a minute. Written by `python benchmarks/pages/notebook.py`, which runs every cell.
# %%
import isoflop
from isoflop.plan.budgets import plan_budget
# %% [markdown]
## Plan

What do 1e11 FLOPs buy? The law was fitted to runs of a minute on this text, the sources of Python's standard library. `write`
makes a recipe of the best shape.
# %%
plan_budget(flops=1e11, family="laptop", law="laptop_law.json", write="toy.yaml")
# %% [markdown]
Every number of the recipe: parameters, FLOPs, memory and time for each launch config.
# %%
plan = isoflop.plan("toy.yaml", gpu="rtx5090", num_gpus=1)
plan
# %%
plan.to_frame()
# %% [markdown]
## Prepare and train

Text becomes windows of token ids on disk; then the recipe is trained. The same call again resumes a stopped run, or returns the
summary of a finished one.
# %%
manifest = isoflop.prepare("toy.yaml")
run = isoflop.pretrain("toy.yaml")
run
# %%
run.val_loss, run.predicted_loss, run.predicted_loss_interval, run.outside
# %% [markdown]
The exported model opens in transformers, without code of this package.
# %%
from transformers import AutoModelForCausalLM

AutoModelForCausalLM.from_pretrained("runs/toy/model").num_parameters()
# %% [markdown]
## Fit a law

The runs of a sweep (`isoflop sweep sweeps/laptop`, 25 minutes on two cores) as a table. Any table of parameters, tokens and
losses works, and so do run folders: `isoflop.fit("runs/laptop")`.
# %%
import pandas

RUNS
fit = isoflop.fit(runs, predict=[2.6e13], resamples=200)
fit
# %% [markdown]
The law predicts the loss of 261,504 parameters on 13,700,096 tokens, five times the largest budget. The run that was trained
afterwards reached 2.7393 ([circle.md](circle.md)).
# %%
float(fit.law.loss(261_504, 13_700_096))
# %%
fit.save("law.json")
bool(isoflop.load_law("law.json").loss(261_504, 13_700_096) == fit.law.loss(261_504, 13_700_096))
"""


def cells() -> list[tuple[str, str]]:
    """Return the notebook's cells: kind and text."""
    parts = re.split(r"^# %%( \[markdown\])?\n", CELLS.replace("RUNS\n", f"{measured_runs()}\n"), flags=re.MULTILINE)[1:]
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [("markdown" if kind else "code", source.strip()) for kind, source in pairs]


def run_cell(source: str, names: dict[str, Any]) -> list[dict[str, Any]]:
    """Run a cell and return its outputs: what it printed, and the value of its last expression."""
    tree, printed = ast.parse(source), io.StringIO()
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    value = None
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        exec(compile(tree, "<cell>", "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)
    outputs = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": printed.getvalue()})
    if value is not None:
        shown = {"text/plain": repr(value)}
        if hasattr(value, "_repr_html_"):
            shown = {"text/plain": f"<{type(value).__name__}>", "text/html": value._repr_html_()}
        elif hasattr(value, "_repr_png_"):
            shown["image/png"] = base64.b64encode(value._repr_png_()).decode()
        outputs.append({"output_type": "execute_result", "execution_count": None, "metadata": {}, "data": shown})
    return outputs


def run_notebook() -> dict[str, Any]:
    """Run all cells in a temporary folder and return the notebook (nbformat 4.5)."""
    names: dict[str, Any] = {"__name__": "__main__"}
    made = []
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for number, (kind, source) in enumerate(cells()):
                cell: dict[str, Any] = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": source}
                if kind == "code":
                    cell |= {"execution_count": None, "outputs": run_cell(source, names)}
                made.append(cell)
        finally:
            os.chdir(before)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {
        "cells": made,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def main() -> None:
    """Write the notebook."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "notebook.ipynb", help="the file that is written")
    file = parser.parse_args().out
    file.write_text(json.dumps(run_notebook(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {file}")


if __name__ == "__main__":
    main()
