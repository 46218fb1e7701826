"""The guide's figures and the messages of the symptoms, compared with what the code computes and prints."""

import ast
import re

import pytest
from conftest import ROOT

from isoflop.config.loading import load_recipe
from isoflop.plan import cost, hardware
from isoflop.plan.launches import read_launch
from isoflop.plan.planner import plan as make_plan
from isoflop.plan.report import duration

DOCS = ROOT / "docs"
GUIDE, SYMPTOMS = ((DOCS / name).read_text(encoding="utf-8") for name in ("guide.md", "symptoms.md"))
CARDS = {"2x A6000": ("a6000", 2), "4x H20": ("h20", 4), "one RTX 5090": ("rtx5090", 1)}


def test_the_table_of_cards_is_what_plan_computes():
    header, *rows = [line.strip("| ").split(" | ") for line in GUIDE.splitlines() if line.startswith(("| recipe |", "| `"))][:6]
    assert header == ["recipe", *CARDS, "checkpoint"]
    assert [row[0].strip("`") for row in rows] == ["gpt2_1.36b", "llama2_1.36b", "llama3_1.5b", "llama3_2.2b", "modern_124m"]
    for name, *cells, checkpoint in rows:
        recipe = load_recipe(ROOT / f"recipes/{name.strip('`')}.yaml")
        assert f"{cost.checkpoint_bytes(recipe.model, recipe.optimizer) / 1e9:.1f} GB" == checkpoint
        for cell, (kind, num_gpus) in zip(cells, CARDS.values(), strict=True):
            compare_with_plan(recipe, cell, kind, num_gpus)


def compare_with_plan(recipe, cell, kind, num_gpus):
    """One cell: launch config, micro-batch where it is not the recipe's, memory and time; or that no micro-batch fits."""
    if cell == "does not fit":
        plan = make_plan(recipe, law="hoffmann", gpu=kind, num_gpus=num_gpus).to_dict()
        assert not plan["largest_micro_batch"]["1gpu"][kind]
        return
    config, micro, memory, time = re.fullmatch(r"`(\w+)`(?:, micro-batch (\d+))?: ([\d.]+) GiB, (.+)", cell).groups()
    assert read_launch(ROOT / f"accelerate_configs/{config}.yaml").num_processes == num_gpus
    if micro:
        recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update={"micro_batch_size": int(micro)})})
    plan = make_plan(recipe, law="hoffmann", gpu=kind, num_gpus=num_gpus).to_dict()
    assert f"{plan['memory_bytes'][config] / 2**30:.2f}" == memory
    assert plan["largest_micro_batch"][config][kind] >= recipe.training.micro_batch_size
    assert duration(plan["hours"][config][kind]) == time


@pytest.mark.parametrize(
    ("recipe", "overrides", "config", "gib", "gpu", "largest"),
    [
        ("llama2_1.36b", ["training.micro_batch_size=4"], "2gpu_zero1", "25.50", "a6000", 8),
        (
            "llama3_1.5b",
            ["training.activation_checkpointing=true"],
            "1gpu",
            "28.10",
            "rtx5090",
            8,
        ),
    ],
)
def test_what_fits_after_a_change_is_what_plan_computes(recipe, overrides, config, gib, gpu, largest):
    loaded = load_recipe(ROOT / f"recipes/{recipe}.yaml", overrides)
    launch, sections = read_launch(ROOT / f"accelerate_configs/{config}.yaml"), (loaded.model, loaded.training, loaded.optimizer)
    assert f"{cost.predicted_memory(*sections, launch).total / 2**30:.2f}" == gib
    assert cost.largest_micro_batch(*sections, launch, hardware.GPUS[gpu].memory_bytes) == largest
    assert f"{gib} GiB" in GUIDE


def literals():
    """Every text of the library, with `…` for what is put in when it is printed."""
    for path in [*(ROOT / "src/isoflop").rglob("*.py"), *(ROOT / "modeling").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def symptoms():
    """Rows of the page of symptoms: what is seen, why, what to do."""
    rows = [re.split(r" \| ", line.strip("| ")) for line in SYMPTOMS.splitlines() if line.startswith("| ")]
    return [row for row in rows if row[0] not in ("what you see", "---")]


def test_the_messages_among_the_symptoms_are_those_of_the_library():
    texts = list(literals())
    messages = [quoted for seen, *_ in symptoms() for quoted in re.findall(r"`([^`]+)`", seen) if " " in quoted]
    assert len(messages) > 25
    for message in messages:
        pattern = re.compile(".*".join(re.escape(piece) for piece in message.strip("… ").split("…")))
        assert any(pattern.search(text) for text in texts), message


def test_every_symptom_has_a_cause_and_a_remedy():
    assert len(symptoms()) > 40
    for row in symptoms():
        assert len(row) == 3, row
        assert all(cell.strip() for cell in row), row
