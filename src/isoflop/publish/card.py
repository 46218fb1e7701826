"""Model card: architecture, training, data, predictions and scores, with every number read from the run's files.

Entered by `model_card`. `card.md` is its template, `sections` makes its tables.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from isoflop.config.loading import load_recipe, to_yaml
from isoflop.config.recipe import Recipe
from isoflop.config.recipe_data import HubSource
from isoflop.evaluate.scores import Score, read_scores, score_markdown
from isoflop.publish import sections
from isoflop.publish.files import read_environment, read_metrics
from isoflop.publish.redaction import published_environment, published_recipe
from isoflop.train.run_folder import RunFolder
from isoflop.train.summary import RunSummary
from isoflop.utils.errors import UserError

UNKNOWN_LICENSE = "unknown"  # the Hub's identifier if none is stated


def model_card(folder: RunFolder, repo_id: str, license: str | None, revisions: Sequence[str] = ()) -> ModelCard:
    """Return the card of a finished run; `license` overrides the recipe's, `revisions` are its checkpoints in the repository.

    The same files give the same card, byte for byte.
    """
    trained = load_recipe(folder.path / "recipe.yaml")
    recipe, summary = published_recipe(trained), folder.read_summary()
    if summary is None:
        raise UserError(f"{folder.path} is not finished: it has no summary.json; resume it with the command that started it")
    scores, launches = read_scores(folder.evaluations), published_environment(read_environment(folder))["launches"]
    values = {
        "metadata": metadata(recipe, summary, scores, repo_id, license).to_yaml(),
        "repo_id": repo_id,
        "remote_code": sections.remote_code(recipe),
        "name": repo_id.split("/")[-1],
        "parameters": sections.rounded(summary.parameters),
        "tokens": sections.rounded(summary.tokens),
        "tokens_per_parameter": summary.tokens / summary.parameters,
        "sources": sections.data_name(recipe),
        "summary": summary,
        "architecture": sections.architecture(recipe),
        "training": sections.training(recipe, summary, launches),
        "launches": [sections.command_line(launch) for launch in launches],
        "version": launches[-1]["versions"].get("isoflop", "unknown"),
        "data": sections.data(recipe, trained.data.prepared_dir, summary.tokens),
        "recipe": recipe,
        "recipe_yaml": to_yaml(recipe, exclude_none=True).strip(),
        "has_curve": folder.curve.is_file(),
        "laws": sections.laws(recipe, summary),
        "own_law": sections.own_law(summary),
        "extrapolations": sections.extrapolations(recipe, summary.tokens),
        "scores": score_markdown(scores, summary.parameters) if scores else None,
        "prompt": (recipe.evaluation.sample_prompts or ["The"])[0],
        "sample": sections.fenced(summary.samples[0]) if summary.samples else None,
        "revisions": sections.revisions(revisions, read_metrics(folder)),
    }
    template = (files(__package__) / "card.md").read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    return ModelCard(environment.from_string(template).render(values))


def metadata(recipe: Recipe, summary: RunSummary, scores: list[Score], repo_id: str, license: str | None) -> ModelCardData:
    """Return the metadata that the Hub reads: licence, data, tags, and the finite losses and scores."""
    measured = [
        ("loss", "validation loss (nats per token)", summary.val_loss),
        ("bits_per_byte", "bits per byte", summary.bits_per_byte),
    ]
    of_training = [
        EvalResult(
            task_type="text-generation",
            dataset_type=named[0] if len(named := hub_names(recipe)) == 1 else "text",
            dataset_name=f"{sections.data_name(recipe)}, held out",
            dataset_split="validation",
            metric_type=metric,
            metric_name=name,
            metric_value=value,
        )
        for metric, name, value in measured
    ]
    trackers = recipe.output.trackers
    return ModelCardData(
        license=license_of(recipe, license),
        datasets=hub_names(recipe) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["isoflop", "pretraining", recipe.model.model_type, *trackers],
        model_name=repo_id.split("/")[-1],
        eval_results=of_training + [eval_result(score) for score in scores if math.isfinite(score.value)],
    )


def license_of(recipe: Recipe, license: str | None) -> str:
    """Return the model's licence: the given one, else the recipe's, else `UNKNOWN_LICENSE`."""
    return license or recipe.hub.license or UNKNOWN_LICENSE


def eval_result(score: Score) -> EvalResult:
    """Return a score as the Hub shows it."""
    error = {} if score.stderr is None else {"standard_error": score.stderr}
    return EvalResult(
        task_type="text-generation",
        dataset_type=score.task,
        dataset_name=score.task,
        metric_type=score.metric,
        metric_value=score.value,
        metric_args={"documents": score.num_documents} | error,
    )


def hub_names(recipe: Recipe) -> list[str]:
    """Return the Hub datasets that the recipe reads, without local folders in the layout of one."""
    named = [source.name for source in recipe.data.sources().values() if isinstance(source, HubSource)]
    return [name for name in dict.fromkeys(named) if name.count("/") == 1 and not Path(name).is_dir()]
