"""The README's first screen, and its table of recipes beside what the code computes."""

import re

from conftest import ROOT

from isoflop.config.loading import load_recipe

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_first_screen_has_the_two_commands():
    assert "```sh\nmake quickstart\nmake test\n```" in README
    assert README.index("make quickstart") < 700
    assert README.count("\n") < 130


def test_the_table_of_recipes_is_right():
    from isoflop.plan import cost, hardware
    from isoflop.plan.launches import read_launch

    rows = re.findall(
        r"^\| `(\w[\w.]*)` \| ([\w-]+) \| ([\d,]+) \| ([\d.]+)([MB]) \| (\d+) GB.*?\| `(\w+)` \|$", README, flags=re.MULTILINE
    )
    assert {row[0] for row in rows} == {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    for name, family, parameters, tokens, unit, memory_gb, config in rows:
        recipe = load_recipe(ROOT / f"recipes/{name}.yaml")
        assert f"{cost.parameters(recipe.model):,}" == parameters
        assert recipe.model.model_type == {"GPT-2": "gpt2", "Llama": "llama", "Hybrid": "hybrid"}[family]
        total = recipe.training.num_steps(0) * recipe.training.tokens_per_step / {"M": 1e6, "B": 1e9}[unit]
        assert f"{total:.1f}" == tokens
        one_gpu = cost.Launch("1gpu", "single", gpu=True)
        needed = cost.predicted_memory(recipe.model, recipe.training, recipe.optimizer, one_gpu).total
        fitting = [gpu.memory_bytes for gpu in hardware.GPUS.values() if needed <= hardware.usable_bytes(gpu.memory_bytes)]
        assert min(fitting) // 2**30 == int(memory_gb), name
        launch = read_launch(ROOT / f"accelerate_configs/{config}.yaml")
        needed = cost.predicted_memory(recipe.model, recipe.training, recipe.optimizer, launch).total
        assert needed <= hardware.usable_bytes(hardware.GPUS["a6000"].memory_bytes), name
