"""The house rules: what may import what, how long a file may be, what is packaged, what a script may be called."""

import ast
import configparser
import re
import subprocess
import sys

import pytest
from conftest import ROOT

LIBRARY = sorted((ROOT / "src/isoflop").rglob("*.py")) + sorted((ROOT / "modeling").rglob("*.py"))
# Imports point down only; modules of one layer do not know each other, except where a name is listed with its reason.
LAYERS = {
    "isoflop": 0, "isoflop.errors": 0, "isoflop.disk": 0, "isoflop.tables": 0, "isoflop.modeling": 0,
    "isoflop.hardware": 0, "isoflop.devices": 0, "isoflop.credentials": 0,
    "isoflop.output": 0, "isoflop.untrusted": 0, "isoflop.records": 1, "isoflop.run_folder": 2, "isoflop.loss_curve": 3,
    "isoflop.recipe": 1, "isoflop.recipe_data": 1, "isoflop.recipe_file": 1, "isoflop.summary": 2, "isoflop.cost": 1,
    "isoflop.families": 2, "isoflop.search": 2, "isoflop.scaling": 2,
    "isoflop.data": 3, "isoflop.optim": 3, "isoflop.checkpoint": 3, "isoflop.metrics": 3, "isoflop.distributed": 3,
    "isoflop.validation": 3, "isoflop.anomaly": 3, "isoflop.stop": 3, "isoflop.scores": 3,
    "isoflop.harness": 3, "isoflop.cpu": 3, "isoflop.run_ahead": 3, "isoflop.training_model": 3,
    "isoflop.garbage": 0, "isoflop.step_time": 2, "isoflop.profiling": 3, "isoflop.flight_recorder": 3,
    "isoflop.job": 4, "isoflop.outcome": 4, "isoflop.prepare": 4, "isoflop.pretrain": 4, "isoflop.resume": 4,
    "isoflop.measure": 4, "isoflop.plan": 4, "isoflop.export": 4, "isoflop.evaluate": 4,
    "isoflop.publish": 4, "isoflop.compare": 4, "isoflop.fit": 4, "isoflop.sweep": 4,
}  # fmt: skip
SAME_LAYER = {
    ("isoflop.disk", "isoflop.errors"),
    ("isoflop.disk", "isoflop.untrusted"),
    ("isoflop.hardware", "isoflop.errors"),
    ("isoflop.run_folder", "isoflop.summary"),  # what one of its files holds
    ("isoflop.untrusted", "isoflop.errors"),
    ("isoflop.errors", "isoflop.output"),  # how a command ends, and what it prints
    ("isoflop.errors", "isoflop.credentials"),
    ("isoflop.output", "isoflop.credentials"),
    ("isoflop.recipe", "isoflop.recipe_data"),  # its longest sections
    ("isoflop.recipe_file", "isoflop.recipe"),  # the reader of what the other describes
    ("isoflop.cost", "isoflop.recipe"),  # shapes come from its model section
    ("isoflop.search", "isoflop.families"),  # ranks their shapes
    ("isoflop.search", "isoflop.scaling"),  # by a law
    ("isoflop.validation", "isoflop.data"),  # reads windows
    ("isoflop.harness", "isoflop.data"),  # the Hub's errors
    ("isoflop.harness", "isoflop.scores"),  # where eval/ is
    ("isoflop.harness", "isoflop.validation"),  # what leaves random states alone
    ("isoflop.evaluate", "isoflop.export"),
    ("isoflop.publish", "isoflop.export"),  # each checkpoint as a model
    ("isoflop.job", "isoflop.publish"),  # pushes them while training goes on
    ("isoflop.outcome", "isoflop.publish"),
    ("isoflop.pretrain", "isoflop.publish"),
    ("isoflop.stop", "isoflop.distributed"),  # a stop is agreed between processes, and passed on by their launcher
    ("isoflop.pretrain", "isoflop.job"),  # the first part of a run
    ("isoflop.pretrain", "isoflop.resume"),  # where it stands
    ("isoflop.resume", "isoflop.job"),
    ("isoflop.pretrain", "isoflop.outcome"),  # and the last
    ("isoflop.outcome", "isoflop.job"),
    ("isoflop.outcome", "isoflop.export"),
    ("isoflop.fit", "isoflop.compare"),  # reads finished runs
    ("isoflop.sweep", "isoflop.prepare"),  # once for all its runs
    ("isoflop.sweep", "isoflop.fit"),  # its last step
    ("isoflop.plan", "isoflop.measure"),  # where real steps are asked for
}


def module_of(path):
    relative = path.relative_to(ROOT / "src") if "src" in path.parts[len(ROOT.parts) :] else "isoflop" / path.relative_to(ROOT)
    return ".".join(relative.with_suffix("").parts).removesuffix(".__init__")


def room_of(module):
    return next(room for room in sorted(LAYERS, key=len, reverse=True) if module == room or module.startswith(f"{room}."))


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or is_remote_code(path)
            neighbour = "isoflop.modeling." if node.level else ""
            yield from (f"{neighbour}{node.module}.{alias.name}" for alias in node.names)


def is_remote_code(path):
    """Published with checkpoints, and imported there without the package: its files find one another as neighbours."""
    return path.parent == ROOT / "modeling" and path.stem.endswith("_hybrid")


@pytest.mark.parametrize("path", LIBRARY, ids=module_of)
def test_imports_point_down(path):
    room = room_of(module_of(path))
    for name in imports_of(path):
        if name.startswith("isoflop."):
            other = room_of(name)
            assert other == room or LAYERS[other] < LAYERS[room] or (room, other) in SAME_LAYER, f"{room} imports {other}"


def test_modeling_stands_alone():
    for path in (ROOT / "modeling").rglob("*.py"):
        roots = {name.split(".")[0] for name in imports_of(path) if not name.startswith("isoflop.modeling.")}
        standard = {"collections", "copy", "functools", "importlib", "math", "typing", "__future__"}
        assert roots <= {"torch", "transformers", "liger_kernel"} | standard  # the last only where a recipe asks for it


def test_remote_code_knows_nothing_of_the_package():
    for path in filter(is_remote_code, LIBRARY):
        assert "import isoflop" not in path.read_text()
        assert "from isoflop" not in path.read_text()


def test_every_module_has_a_layer():
    assert {room_of(module_of(path)) for path in LIBRARY} == set(LAYERS)


def test_recipes_are_read_and_plans_made_without_torch():
    code = "import sys, isoflop.plan.command; assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_files_and_functions_stay_readable():
    for path in LIBRARY:
        source = path.read_text()
        assert len(source.splitlines()) <= 400, path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 40, f"{path}: {node.name}"
        assert not re.search(r"\b(TODO|FIXME|XXX)\b", source), path


def test_the_packages_listed_are_those_of_the_tree():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    assert listed == {module_of(path) for path in LIBRARY if path.name == "__init__.py"}


def test_no_script_bears_a_librarys_name():
    import importlib.util

    scripts = {path.stem for path in (ROOT / "scripts").glob("*.py")}
    assert not scripts & (
        set(sys.stdlib_module_names) | {"evaluate", "tokenizers", "datasets", "transformers", "torch", "accelerate"}
    )
    for name in scripts:
        found = importlib.util.find_spec(name)
        assert found is None or found.loader is None, name  # a folder of tests is no library


def test_scripts_are_thin_and_say_how_they_are_launched():
    for path in (ROOT / "scripts").glob("*.py"):
        source = path.read_text()
        assert len(source.splitlines()) <= 60
        assert f"scripts/{path.name}" in ast.get_docstring(ast.parse(source))


def test_launch_configs_say_for_whom_and_load():
    from accelerate.commands.config.config_args import load_config_from_file

    for path in (ROOT / "accelerate_configs").glob("*.yaml"):
        assert path.read_text().startswith("# For ")
        config = load_config_from_file(str(path))
        nodes, devices = re.match(r"(?:(\d+)node_)?(\d*)", path.stem).groups()
        assert config.num_processes == int(nodes or 1) * int(devices or 1)
