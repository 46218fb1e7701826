"""`isoflop export`: write a run's model as one file for llama.cpp, Ollama or LM Studio."""

from __future__ import annotations

import importlib.util

from isoflop.cli.parser import Parser
from isoflop.utils.errors import UserError

DESCRIPTION = """\
Write a run's model as one GGUF file for llama.cpp, Ollama or LM Studio.

  isoflop export runs/quickstart --to gguf
"""


def main(arguments: list[str], prog: str) -> int:
    """Parse before torch is imported. Returns the exit code."""
    parser = Parser(prog=prog, description=DESCRIPTION)
    parser.add_argument("model", help="runs/NAME, runs/NAME/checkpoints/step-N, or a folder with config.json")
    parser.add_argument("--to", choices=["gguf"], default="gguf", help="format")
    parser.add_argument("--type", choices=["f32", "f16", "bf16", "q8_0"], default="f16", help="number type of the matrices")
    parser.add_argument("--output", metavar="FILE", help="the file (default: MODEL.TYPE.gguf)")
    given = parser.parse_args(arguments)
    if importlib.util.find_spec("gguf") is None:
        raise UserError("--to = gguf needs the package gguf: pip install 'gguf>=0.19,<0.20'")

    from isoflop.publish.gguf import export_command

    return export_command(**vars(given))
