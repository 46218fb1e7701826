"""`isoflop eval`: evaluate a run, a checkpoint, a saved model or a Hub name with lm-eval."""

from __future__ import annotations

import json

from isoflop.cli import launch
from isoflop.cli.parser import Parser
from isoflop.utils.errors import UserError

DESCRIPTION = """\
Evaluate a run, one of its checkpoints, a saved model or a Hub name with
lm-eval, on a shipped suite or any of lm-eval's tasks. Several GPUs share the
documents with --launch 2gpu_ddp.

  isoflop eval runs/quickstart --suite quick
"""


def main(arguments: list[str], prog: str) -> int:
    """Parse before lm-eval is imported, which takes seconds. Returns the exit code."""
    parser = Parser(prog=prog, description=DESCRIPTION)
    parser.add_argument("model", help="runs/NAME, runs/NAME/checkpoints/step-N, a folder with config.json, or user/name")
    parser.add_argument("--suite", default="quick", help="quick (offline), gpt2_zero_shot, pretraining, or TASK,TASK")
    launch.add_options(parser)
    parser.add_argument("--backend", default="hf", help="one of lm-eval's model types: hf, vllm, gguf ...")
    parser.add_argument("--model-args", default="", metavar="K=V,...", help="as lm-eval takes them, e.g. dtype=bfloat16")
    parser.add_argument("--batch-size", default="8", metavar="N", help="sequences in a batch, or auto")
    parser.add_argument("--device", help="cuda, cuda:1, cpu ... (default: cuda where there is one, else cpu)")
    parser.add_argument("--limit", type=int, metavar="N", help="documents of each task, for a first look (default: all)")
    parser.add_argument("--metadata", type=mapping, metavar="JSON", help="""for tasks that read it: '{"file": "mine.jsonl"}'""")
    parser.add_argument("--output", metavar="DIR", help="folder of the results (default: the run's evaluations/SUITE)")
    given = parser.parse_args(arguments)
    if given.num_processes and not given.launch:
        parser.error(f"--num-processes {given.num_processes} needs --launch CONFIG, e.g. --launch 2gpu_ddp")

    from isoflop.data.hub import require_exists

    if given.backend in ("hf", "vllm"):
        require_exists("model", given.model)
    if given.launch:
        launch.exec_launcher("eval", arguments, given)
    options = {name: value for name, value in vars(given).items() if name not in ("launch", "num_processes")}

    from isoflop.evaluate.run import evaluate_command

    return evaluate_command(**options)


def mapping(text: str) -> dict[str, object]:
    """Parse a JSON object. Raises `UserError`."""
    from isoflop.utils.untrusted import unique_keys

    try:
        value = json.loads(text, object_pairs_hook=unique_keys)
    except ValueError as error:
        value, reason = None, f" ({error})"
    else:
        reason = ""
    if not isinstance(value, dict):
        raise UserError(f"""--metadata {text}: give a JSON object, e.g. '{{"file": "mine.jsonl"}}'{reason}""")
    return value
