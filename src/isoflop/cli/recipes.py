"""`isoflop recipes`: list the shipped recipes, sweeps and launch configs, print one, or copy it to edit it."""

from __future__ import annotations

import textwrap
from pathlib import Path

from isoflop.cli.parser import Parser
from isoflop.config.shipped import Kind, find, shipped
from isoflop.utils.io import write_new

DESCRIPTION = """\
List the shipped recipes, sweeps and launch configs. A file of yours with the
same path, such as recipes/quickstart.yaml, comes before the shipped one.

  isoflop recipes
  isoflop recipes show llama2_1.36b
  isoflop recipes copy llama2_1.36b mine.yaml
"""


def main(arguments: list[str], prog: str) -> int:
    """Run the command; returns the exit code."""
    parser = Parser(prog=prog, description=DESCRIPTION)
    actions = parser.add_subparsers(dest="action", metavar="list | show | copy")
    actions.add_parser("list", prog=f"{prog} list", help="what is shipped, a line each (the default)")
    show = actions.add_parser("show", prog=f"{prog} show", help="print a recipe, a sweep or a launch config")
    show.add_argument("name", help="as `isoflop recipes` lists it")
    copy = actions.add_parser("copy", prog=f"{prog} copy", help="write a copy of one")
    copy.add_argument("name", help="as `isoflop recipes` lists it")
    copy.add_argument("file", nargs="?", help="where to (default: recipes/NAME.yaml or accelerate_configs/NAME.yaml here)")
    given = parser.parse_args(arguments)
    if given.action in (None, "list"):
        print(listing())
        return 0
    kind: Kind = "accelerate_configs" if given.name in shipped("accelerate_configs") else "recipes"
    source = find(kind, given.name)
    text = source.read_text(encoding="utf-8")
    if given.action == "show":
        print(text, end="")
        return 0
    target = Path(given.file or f"{kind}/{given.name.removeprefix(f'{kind}/').removesuffix('.yaml')}.yaml")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_new(target, text, str(target))
    print(f"wrote {target}")
    return 0


def listing() -> str:
    """Return what is shipped as text: each name with the first line of its file's description."""
    recipes = shipped("recipes")
    groups: list[tuple[str, Kind, list[str]]] = [
        ("recipes", "recipes", [name for name in recipes if "/" not in name]),
        ("ablations", "recipes", [name for name in recipes if name.startswith("ablations/")]),
        ("sweeps (isoflop sweep)", "recipes", [name for name in recipes if name.startswith("sweeps/")]),
        ("launch configs (--launch)", "accelerate_configs", shipped("accelerate_configs")),
    ]
    lines = []
    for title, kind, names in groups:
        width = max(map(len, names))
        lines += [f"{title}:", *(f"  {name:{width}}  {summary(kind, name, 76 - width)}" for name in names), ""]
    return "\n".join(lines).rstrip()


def summary(kind: Kind, name: str, width: int) -> str:
    """Return the first line of a file's description, at most `width` characters of it."""
    lines = find(kind, name).read_text(encoding="utf-8").splitlines()
    comment = next((line for line in lines if line.startswith("# ") and "yaml-language-server" not in line), "#")
    return textwrap.shorten(comment.removeprefix("#").strip(), width, placeholder=" ...")
