"""A toy corpus, prepared once, and toy recipes over it. Real files, real processes, one thread each."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if os.environ.get("ISOFLOP_TEST_GPU") != "1":  # `make test` sets it for tests/gpu alone
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests state what a CPU does, also on a machine with GPUs
    os.environ["ACCELERATE_USE_CPU"] = "true"  # so that launch configs for GPUs run on CPU processes

import fcntl
import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import forks
import pytest
import yaml

ROOT = Path(__file__).parent.parent
EVERY_CASE = os.environ.get("ISOFLOP_TEST_ALL") == "1"  # `make test-all`: full repetitions, real processes, every pair

TOY_MODELS = {
    "llama": {
        "model_type": "llama", "vocab_size": 320, "max_position_embeddings": 64, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "gpt2": {"model_type": "gpt2", "vocab_size": 320, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "hybrid": {
        "model_type": "hybrid", "vocab_size": 320, "max_position_embeddings": 64, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 3, "head_dim": 10, "norm_position": "post", "mlp": "relu2",
        "qk_norm": True, "final_logit_softcapping": 30.0,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_accelerator_at_a_time():
    """Accelerate keeps its state in the process; each test starts without one."""
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@pytest.fixture(autouse=True)
def forked_commands(request, monkeypatch):
    """`sys.executable` is the stand-in of tests/forks.py, but for tests that are about processes themselves."""
    if request.node.get_closest_marker("new_process"):
        monkeypatch.setenv("ISOFLOP_TEST_REAL", "1")
    monkeypatch.setattr(sys, "executable", forks.python())


def shared(tmp_path_factory, name, make):
    """A folder that `make(folder)` fills once for all test processes; the others wait for it."""
    root = tmp_path_factory.getbasetemp()
    root = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "shared"
    root.mkdir(exist_ok=True)
    folder, made = root / name, root / f"{name}.made"
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            made.touch()
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Forty small text files: modules of the standard library."""

    def make(folder):
        stdlib = Path(sysconfig.get_paths()["stdlib"])
        sources = sorted(f for f in stdlib.glob("*.py") if 2_000 < f.stat().st_size < 12_000)
        for source in sources[:40]:
            (folder / f"{source.stem}.txt").write_text(source.read_text(encoding="utf-8"), encoding="utf-8")

    return shared(tmp_path_factory, "corpus", make)


@pytest.fixture
def fifty_documents(tmp_path):
    """The same fifty documents in every local form."""
    import gzip

    import pyarrow as pa
    import pyarrow.parquet

    rows = [f"document {i}\nsecond line é\n" for i in range(50)]
    for i, text in enumerate(rows):
        (tmp_path / f"doc{i:02}.txt").write_text(text, encoding="utf-8")
    lines = "".join(json.dumps({"text": text, "score": i}) + "\n" for i, text in enumerate(rows))
    (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    with pa.output_stream(tmp_path / "rows.jsonl.zst", compression="zstd") as stream:
        stream.write(lines.encode())
    pa.parquet.write_table(pa.table({"text": rows, "score": range(50)}), tmp_path / "rows.parquet")
    return tmp_path


def rows_of(folder):
    """The texts of `fifty_documents`."""
    return [json.loads(line)["text"] for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]


def documents_of(opened):
    """All texts of an opened source, in order."""

    from isoflop.config.recipe_data import Filter
    from isoflop.data.documents import read_documents

    return [
        text
        for table in opened.tables
        for number in range(table.num_parts)
        for batch in read_documents(table, number, Filter())
        for text in batch.texts.to_pylist()
    ]


@pytest.fixture(scope="session")
def toy_tree(corpus, tmp_path_factory):
    """Sections of a toy recipe whose data is prepared once for all tests."""
    from isoflop.config.recipe import Recipe
    from isoflop.prepare.run import prepare

    def make(folder):
        prepare(Recipe.model_validate(tree_over(folder / "toy")))

    def tree_over(prepared):
        return {
            "model": TOY_MODELS["llama"],
            "tokenizer": {"train_vocab_size": 300},
            "data": {
                "source": {"kind": "text", "files": [f"{corpus}/*.txt"]},
                "prepared_dir": str(prepared),
                "validation_fraction": 0.1,
            },
            "training": {"sequence_length": 32, "tokens_per_step": 256, "micro_batch_size": 4, "max_steps": 10},
            "optimizer": {"peak_learning_rate": 3e-3},
            "schedule": {"name": "cosine", "warmup_steps": 2, "final_learning_rate": 3e-4},
            "evaluation": {"validate_every": 5, "max_windows": 16, "sample_tokens": 4},
            "output": {"run_dir": "runs/toy", "checkpoint_every": 5},
        }

    return tree_over(shared(tmp_path_factory, "prepared", make) / "toy")


def train(tree, folder):
    """Train a recipe into a folder, in this process, which may have trained another one before; returns the recipe."""
    from accelerate.state import AcceleratorState, GradientState

    from isoflop.config.recipe import Recipe
    from isoflop.train.command import pretrain_command as pretrain

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    recipe = Recipe.model_validate({**tree, "output": {**tree["output"], "run_dir": str(folder)}})
    assert pretrain(recipe) == 0
    return recipe


@pytest.fixture(scope="session")
def uninterrupted(toy_tree, tmp_path_factory):
    """The toy recipe run once to its end, for each family: what every interrupted run is compared with."""
    from isoflop.config.recipe import Recipe

    def make(folder):
        for family, model in TOY_MODELS.items():
            train({**toy_tree, "model": model}, folder / family)

    folder, recipes = shared(tmp_path_factory, "uninterrupted", make), {}
    for family, model in TOY_MODELS.items():
        tree = {**toy_tree, "model": model, "output": {**toy_tree["output"], "run_dir": str(folder / family)}}
        recipes[family] = Recipe.model_validate(tree)
    return recipes


def write_toy(toy_tree, model, file, run_dir, changes):
    """Write the toy recipe with a model, a run folder, and some keys set (`section__key`); returns its path."""
    tree = json.loads(json.dumps(toy_tree)) | {"model": dict(model)}
    tree["output"]["run_dir"] = str(run_dir)
    for key, value in changes.items():
        section, leaf = key.split("__")
        tree.setdefault(section, {})[leaf] = value
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return file


@pytest.fixture
def write_recipe(toy_tree, tmp_path):
    """Write the toy recipe with some dotted keys set; returns its path."""

    def write(name="toy", family="llama", **changes):
        return write_toy(toy_tree, TOY_MODELS[family], tmp_path / f"{name}.yaml", tmp_path / "runs" / name, changes)

    return write


@pytest.fixture
def on_the_console():
    """Print what the package logs, as its commands do."""
    from isoflop.utils.output import log_to_console

    log_to_console()


@pytest.fixture
def toy_recipe(write_recipe):
    """The toy recipe, loaded, with some dotted keys set."""
    from isoflop.config.loading import load_recipe

    return lambda *args, **changes: load_recipe(write_recipe(*args, **changes))


@pytest.fixture
def run_in_process():
    """`pretrain` in this process, with accelerate's state fresh before and after."""
    from accelerate.state import AcceleratorState, GradientState

    from isoflop.train.command import pretrain_command as pretrain

    def run(recipe, **flags):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        return pretrain(recipe, **flags)

    return run


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Runs of several ranks without the seconds that each start of Python takes."""
    from ranks import Ranks

    return Ranks(tmp_path_factory.mktemp("ranks"))


@pytest.fixture
def tried(record_property):
    """Record that a fault was really caused, so many times, and what showed that nothing was lost, for docs/reliability.md."""

    def note(fault, times=1, proof="losses, gradient norms and weights bit for bit those of an uninterrupted run"):
        for name, value in (("fault", fault), ("times", times), ("proof", proof)):
            record_property(name, value)

    return note


def metrics_of(recipe):
    """Rows of a run's metrics."""
    return metrics_of_folder(Path(recipe.output.run_dir))


def metrics_of_folder(folder):
    """Rows of `metrics.jsonl` in a run's folder."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def metrics_row(step, **values):
    """A row of `metrics.jsonl` with what every row has."""
    row = {
        "step": step, "tokens": 256 * step, "loss": 3.0, "val_loss": None, "learning_rate": 3e-4, "tokens_per_s": 100.0,
        "mfu": None, "elapsed_s": step / 10, "peak_memory_bytes": 10**9,
    }  # fmt: skip
    return row | values


def summary_with(**values):
    """A `summary.json` with what every one has."""
    names = (
        "steps", "tokens", "parameters", "flops", "loss", "val_loss", "bits_per_byte", "unigram_entropy_nats", "tokens_per_s",
        "predicted_memory_bytes", "peak_memory_bytes", "elapsed_s",
    )  # fmt: skip
    return dict.fromkeys(names, 1) | {"mfu": None, "samples": []} | values


def curve_of(recipe):
    """What must repeat bit for bit: (step, loss, validation loss, gradient norm, learning rate)."""
    return [(r["step"], r["loss"], r["val_loss"], r["grad_norm"], r["learning_rate"]) for r in metrics_of(recipe)]


def weights_of(recipe):
    """The exported weights, as bytes."""
    return (Path(recipe.output.run_dir) / "model" / "model.safetensors").read_bytes()


def run_command(*command, timeout=300, check=True, **kwargs):
    """Run a command from the project's root, as a user would; `python` is the stand-in of tests/forks.py."""
    command = [forks.python() if part == forks.REAL else str(part) for part in command]
    env = {**os.environ, "PATH": f"{Path(forks.python()).parent}:{os.environ['PATH']}", **kwargs.pop("env", {})}
    done = subprocess.run(
        command, cwd=kwargs.pop("cwd", ROOT), env=env, capture_output=True, text=True, timeout=timeout, check=False, **kwargs
    )
    assert not check or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def launch(config, *arguments, **kwargs):
    """`accelerate launch` of scripts/pretrain.py with a config of accelerate_configs/."""
    command = ["accelerate", "launch", "--config_file", f"accelerate_configs/{config}.yaml"]
    if config != "cpu":
        command += ["--main_process_port", "0"]  # a free port: tests run side by side
    return run_command(*command, "scripts/pretrain.py", *arguments, **kwargs)
