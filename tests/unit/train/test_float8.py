"""float8 matrix products by torchao, on a CPU in fp32 products of rounded operands."""

import subprocess
import sys

import pytest
from conftest import metrics_of
from transformers import AutoModelForCausalLM

from isoflop.utils.errors import UserError

WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


@pytest.fixture(scope="module")
def torchao(tmp_path_factory):
    """A folder with torchao, which is not in the environment of all other tests: transformers would import it at every start."""
    folder = tmp_path_factory.mktemp("torchao")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, "torchao==0.18.0"]
    if subprocess.run(command, check=False).returncode:
        pytest.skip("torchao could not be installed")
    return folder


def wide(toy_recipe, name, family="llama"):
    recipe = toy_recipe(name, family)
    return recipe if family == "gpt2" else recipe.model_copy(update={"model": recipe.model.model_copy(update=WIDE)})


def test_layers_train_in_float8_and_the_head_does_not(toy_recipe, run_in_process, monkeypatch, torchao):
    monkeypatch.syspath_prepend(torchao)
    from torchao.float8.float8_linear import Float8Linear

    import isoflop.train.trainer as pretrain

    seen, build_job = [], pretrain.build_job
    monkeypatch.setattr(pretrain, "build_job", lambda *given: seen.append(build_job(*given)) or seen[-1])
    losses, names = {}, {}
    for precision in ("bf16", "fp8"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
        recipe = wide(toy_recipe, precision)
        assert run_in_process(recipe) == 0
        losses[precision] = [row["loss"] for row in metrics_of(recipe)]
        names[precision] = list(seen[-1].causal_lm.state_dict())
    model = seen[-1].causal_lm
    converted = [name for name, module in model.named_modules() if isinstance(module, Float8Linear)]
    assert len(converted) == 2 * 7  # q, k, v, o, gate, up, down of two layers
    assert "lm_head" not in converted
    assert names["fp8"] == names["bf16"]
    assert losses["fp8"] != losses["bf16"]
    assert losses["fp8"] == pytest.approx(losses["bf16"], abs=0.05)
    opened = AutoModelForCausalLM.from_pretrained(f"{recipe.output.run_dir}/model")
    assert not [module for module in opened.modules() if isinstance(module, Float8Linear)]


def test_gpt2s_projections_are_refused(toy_recipe, run_in_process, monkeypatch, torchao):
    monkeypatch.syspath_prepend(torchao)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(UserError, match=r"mixed_precision: fp8 .*: not with GPT2LMHeadModel.*use a config of bf16"):
        run_in_process(wide(toy_recipe, "gpt2", "gpt2"))


def test_without_torchao_the_remedy_is_named(toy_recipe, run_in_process, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "torchao" else find(name, *rest))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(UserError, match=r"needs torchao, which is not installed; run: pip install torchao"):
        run_in_process(wide(toy_recipe, "fp8"))
