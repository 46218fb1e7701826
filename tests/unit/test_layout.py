"""The house rules: what may import what, how long a file may be, what is packaged, what a script may be called."""

import ast
import configparser
import re
import subprocess
import sys

import pytest
from conftest import ROOT

PACKAGE = ROOT / "src/isoflop"
LIBRARY = sorted([*(p for p in PACKAGE.rglob("*.py") if "modeling" not in p.parts), *(PACKAGE / "modeling").glob("*.py")])
# From the lowest layer to the highest. A module imports from its own package and from lower layers; the longest prefix counts.
LAYERS = [
    ["isoflop.utils", "isoflop.modeling"],
    ["isoflop.config"],
    ["isoflop.plan.hardware", "isoflop.plan.shape", "isoflop.plan.optimizer_cost", "isoflop.plan.cost", "isoflop.plan.families",
     "isoflop.train.devices", "isoflop.train.records",
     "isoflop.train.optimizers", "isoflop.train.deepspeed"],
    ["isoflop.scaling"],
    ["isoflop.data", "isoflop.checkpoint", "isoflop.plan.search"],
    ["isoflop.train.run_folder", "isoflop.train.summary", "isoflop.train.plots", "isoflop.train.export",
     "isoflop.train.evaluation", "isoflop.evaluate.scores"],
    ["isoflop.evaluate.harness", "isoflop.compare", "isoflop.prepare", "isoflop.publish"],
    ["isoflop.train", "isoflop.evaluate.run", "isoflop.scaling.runs", "isoflop.scaling.fit"],
    ["isoflop.plan", "isoflop.sweep"],
    ["isoflop.cli"],
    ["isoflop"],  # the public API and `python -m isoflop`
]  # fmt: skip
LAYER_OF = {prefix: number for number, prefixes in enumerate(LAYERS) for prefix in prefixes}


def module_of(path):
    return ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")


def layer_of(name):
    prefixes = [prefix for prefix in LAYER_OF if name == prefix or name.startswith(f"{prefix}.")]
    return LAYER_OF[max(prefixes, key=len)]


def package_of(name):
    return f"{name}.".split(".")[1]


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
    return path.parent.name == "modeling" and path.stem.endswith("_hybrid")


@pytest.mark.parametrize("path", LIBRARY, ids=module_of)
def test_imports_point_down(path):
    module = module_of(path)
    for name in imports_of(path):
        if name.startswith("isoflop.") and package_of(name) != package_of(module):
            assert layer_of(name) < layer_of(module), f"{module} imports {name}"


def test_modeling_stands_alone():
    for path in (PACKAGE / "modeling").glob("*.py"):
        roots = {name.split(".")[0] for name in imports_of(path) if not name.startswith("isoflop.modeling.")}
        standard = {"collections", "copy", "dataclasses", "functools", "importlib", "math", "typing", "__future__"}
        assert roots <= {"torch", "transformers", "liger_kernel"} | standard  # the last only where a recipe asks for it


def test_remote_code_knows_nothing_of_the_package():
    for path in filter(is_remote_code, LIBRARY):
        assert "import isoflop" not in path.read_text()
        assert "from isoflop" not in path.read_text()


def test_every_layer_has_modules():
    modules = {module_of(path) for path in LIBRARY}
    assert all(any(f"{m}.".startswith(f"{prefix}.") for m in modules) for prefix in LAYER_OF)


@pytest.mark.new_process
def test_recipes_are_read_and_plans_made_without_torch():
    code = "import sys, isoflop.cli.plan; assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
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
