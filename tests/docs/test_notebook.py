"""The notebook is run anew: every cell without an error, with outputs of the kinds that the committed one shows."""

import json
import subprocess
import sys

from conftest import ROOT


def outputs(notebook):
    """Kinds of output of each code cell."""
    return [
        [sorted(out["data"]) if "data" in out else out["output_type"] for out in cell["outputs"]]
        for cell in notebook["cells"]
        if cell["cell_type"] == "code"
    ]


def last_value(notebook, source):
    cell = next(cell for cell in notebook["cells"] if source in cell["source"])
    return cell["outputs"][-1]["data"]["text/plain"]


def test_the_notebook_runs_and_shows_what_the_committed_one_shows(tmp_path):
    file = tmp_path / "notebook.ipynb"
    subprocess.run([sys.executable, "benchmarks/pages/notebook.py", "--out", file], cwd=ROOT, check=True, timeout=400)
    new, committed = (json.loads(path.read_text(encoding="utf-8")) for path in (file, ROOT / "docs/notebook.ipynb"))
    assert [cell["source"] for cell in new["cells"]] == [cell["source"] for cell in committed["cells"]]
    assert outputs(new) == outputs(committed)
    predicted, measured = float(last_value(new, "float(fit.law.loss")), 2.7393
    assert abs(predicted / measured - 1) < 0.03
    assert last_value(new, "isoflop.load_law") == "True"
