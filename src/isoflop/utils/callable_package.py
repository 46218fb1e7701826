"""Packages that can be called like the function they are named after: `isoflop.plan(recipe)`.

Importing `isoflop.plan.cost` binds the package to the name `isoflop.plan`, so a function of that name could not be reached. The
package itself is made callable instead (a module's `__class__` may be set: Python's data model, "Customizing module attribute
access").
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


def make_callable(package: str, module: str) -> None:
    """Make a package callable: a call goes to the function of the package's own name in `module`, imported by then."""
    name = package.rpartition(".")[2]

    class CallablePackage(ModuleType):
        """A package whose call is one of its functions."""

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return getattr(importlib.import_module(module), name)(*args, **kwargs)

        @property
        def __wrapped__(self) -> Any:  # for help() and inspect.signature()
            return getattr(importlib.import_module(module), name)

    sys.modules[package].__class__ = CallablePackage
