"""Checkpoints pushed during training: real runs, the real client, the Hub's stand-in."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, curve_of, weights_of
from hub import Hub
from transformers import AutoModelForCausalLM

from isoflop.config.loading import load_recipe
from isoflop.train.signals import EXIT_RESUME

pytestmark = pytest.mark.processes

NAME = "alice/toy"


@pytest.fixture
def hub():
    with Hub() as standin:
        standin.account("hf_alice", "alice")
        yield standin


@pytest.fixture
def pretrain(hub, tmp_path):
    """Start scripts/pretrain.py with the stand-in as its Hub."""

    def start(file, *overrides, token="hf_alice"):
        env = hub.env(tmp_path / "home", token) | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "scripts/pretrain.py", str(file), *overrides]
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return start


def finished(process, code=0):
    output = process.communicate(timeout=120)[0]
    assert process.returncode == code, output
    return output


def test_a_run_pushes_its_checkpoints_and_then_itself(hub, pretrain, toy_recipe, write_recipe, uninterrupted, tmp_path):
    """The first push fails; the next one takes up what it left. Training is that of a run without a Hub, bit for bit."""
    hub.break_file(f"/{NAME}/refs", times=2, status=503)
    file = write_recipe(hub__repo_id=NAME)
    output = finished(pretrain(file))
    recipe = load_recipe(file)
    assert curve_of(recipe) == curve_of(uninterrupted["llama"])
    assert weights_of(recipe) == weights_of(uninterrupted["llama"])
    assert f"hub.repo_id = '{NAME}' was not checked" in output
    assert "checkpoints were not pushed: hub.repo_id = 'alice/toy'" in output
    files = hub.files(NAME)
    assert files["model.safetensors"] == weights_of(recipe)
    assert {"README.md", "config.json", "tokenizer.json", "recipe.yaml", "metrics.jsonl"} <= set(files)
    assert set(hub.repositories["models", NAME].tags) == {"step-5", "step-10"}
    assert hub.files(NAME, "step-10")["model.safetensors"] == weights_of(recipe)
    assert hub.files(NAME, "step-5")["model.safetensors"] != weights_of(recipe)
    (tmp_path / "at5").mkdir()
    for name, content in hub.files(NAME, "step-5").items():
        (tmp_path / "at5" / name).write_bytes(content)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "at5").num_parameters() == 28_832


def test_a_hub_that_does_not_answer_stops_nothing(hub, pretrain, write_recipe, uninterrupted):
    hub.shutdown()
    hub.server_close()
    file = write_recipe(hub__repo_id=NAME)
    output = finished(pretrain(file))
    assert curve_of(load_recipe(file)) == curve_of(uninterrupted["llama"])
    assert f"hub.repo_id = '{NAME}' was not checked" in output
    assert "not published: " in output
    assert f"publish it with: isoflop publish {load_recipe(file).output.run_dir}" in output


def test_what_would_fail_the_final_push_is_refused_before_training(pretrain, write_recipe):
    """Each refusal has its test in test_publish.py."""
    file = write_recipe(hub__repo_id="bob/toy")
    output = finished(pretrain(file), code=2)
    assert "hub.repo_id = 'bob/toy': the token is that of alice, who is not bob" in output
    assert not Path(load_recipe(file).output.run_dir).exists()


def test_a_signal_does_not_wait_for_a_push(hub, pretrain, write_recipe):
    """The Hub takes the request and never answers; the run leaves all the same."""
    hub.stalled = "/info/lfs/objects/batch"
    file = write_recipe(hub__repo_id=NAME, training__max_steps=100_000)
    process = pretrain(file)
    deadline = time.monotonic() + 60
    while not any(path.endswith(hub.stalled) for _, path in hub.requests) and time.monotonic() < deadline:
        time.sleep(0.05)
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    output = finished(process, code=EXIT_RESUME)
    assert time.monotonic() - started < 15
    assert "saved; the same command resumes from step-" in output
