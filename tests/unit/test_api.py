"""The public API: instant to import, complete, and callable in any order of imports."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.new_process

API = ["compare", "evaluate", "fit", "load_law", "load_recipe", "plan", "prepare", "pretrain", "publish"]


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_imports_no_library():
    code = "import sys; before = set(sys.modules); import isoflop; print(*{m.split('.')[0] for m in set(sys.modules) - before})"
    assert set(python(code).split()) <= {*sys.stdlib_module_names, "isoflop"}


@pytest.mark.parametrize("name", API)
def test_each_function_is_callable_and_documented(name):
    import inspect

    import isoflop

    function = getattr(isoflop, name)
    assert callable(function)
    assert inspect.signature(function).parameters
    assert name in dir(isoflop)


@pytest.mark.parametrize("before", ["", "import isoflop.plan.cost; "], ids=["alone", "after a submodule"])
def test_a_package_of_a_functions_name_is_that_function(before):
    code = f"{before}import isoflop; print(type(isoflop.plan(isoflop.load_recipe('quickstart'))).__name__, isoflop.plan.__name__)"
    assert python(code) == "Plan isoflop.plan"


def test_an_unknown_name_is_an_attribute_error():
    import isoflop

    with pytest.raises(AttributeError, match="no attribute 'trane'"):
        isoflop.trane  # noqa: B018
