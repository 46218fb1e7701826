"""`evaluate`: a model's scores by lm-eval, compared with published ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isoflop.data.hub import require_exists
from isoflop.evaluate.scores import RESULTS, Score, require_own_results, score_table, scores_of, table_rows, write_results
from isoflop.utils.html import html_table

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class EvaluationResult:
    """Scores of a model on a suite. A notebook shows them as a table."""

    model: str
    suite: str
    scores: list[Score]
    parameters: int | None
    """The model's size, for the nearest published scores; None if lm-eval does not report it."""
    folder: Path
    """Holds results.json and results.md."""
    results: dict[str, Any]
    """lm-eval's own results."""

    def to_dict(self) -> dict[str, Any]:
        """Return model, suite and scores as JSON values; `results` has the rest."""
        scores = [score._asdict() for score in self.scores]
        return {"model": self.model, "suite": self.suite, "parameters": self.parameters, "scores": scores}

    def to_frame(self) -> pandas.DataFrame:
        """Return a row per task and metric."""
        import pandas

        return pandas.DataFrame([score._asdict() for score in self.scores])

    def table(self) -> str:
        """Return the scores as a table for a terminal, with the nearest published ones."""
        return score_table(self.scores, self.parameters)

    def _repr_html_(self) -> str:
        return html_table(*table_rows(self.scores, self.parameters), caption=f"{self.model}, suite {self.suite}")


def evaluate(
    model: str | Path,
    suite: str = "quick",
    *,
    backend: str = "hf",
    model_args: str = "",
    batch_size: int | str = 8,
    device: str | None = None,
    limit: int | None = None,
    metadata: dict[str, Any] | None = None,
    output: str | Path | None = None,
) -> EvaluationResult | None:
    """Evaluate a run, one of its checkpoints, a saved model or a Hub name; write `results.json` and `results.md`.

    `suite` names suites or tasks, separated by commas: of the user's own `eval/` or a YAML file, else of the package, else of
    lm-eval. `model_args`, `batch_size`, `device` and `limit` are lm-eval's. The results go to `output`, by default the run's
    `evaluations/SUITE`. Under `accelerate launch` the ranks share the documents, and ranks other than the first return None.
    Raises `UserError` for a model or a task that cannot be loaded.
    """
    if backend in ("hf", "vllm"):
        require_exists("model", str(model))
    from isoflop.evaluate.harness import load_tasks, run_tasks  # lm-eval takes seconds to import
    from isoflop.train.export import model_folder

    tasks = load_tasks("--suite", suite.split(","), metadata)
    with model_folder(str(model)) as (pretrained, results_folder):
        folder = Path(output) if output else results_folder / folder_name(suite)
        require_own_results(folder)
        results = run_tasks(
            str(model), pretrained, tasks, backend=backend, model_args=model_args, batch_size=str(batch_size), device=device,
            limit=limit,
        )  # fmt: skip
    if results is None:
        return None
    parameters = results["config"].get("model_num_parameters")
    write_results(results, folder, parameters)
    return EvaluationResult(str(model), suite, scores_of(results), parameters, folder, results)


def folder_name(suite: str) -> str:
    """Return the name of a suite's results folder: suites and tasks as given, of files their stems."""
    return ",".join(Path(name).stem if Path(name).is_file() else name for name in suite.split(","))


def evaluate_command(**options: Any) -> int:
    """Evaluate by the keyword arguments of `evaluate`, and print the table; return the exit code."""
    result = evaluate(**options)
    if result is not None:
        print(result.table())
        print(f"results: {result.folder / RESULTS}, {result.folder / 'results.md'}")
    return 0
