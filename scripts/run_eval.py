"""Evaluate a run, a checkpoint, a saved model or a Hub name by lm-eval: python scripts/run_eval.py runs/quickstart --suite quick.

A suite of eval/suites, or any tasks of lm-eval and eval/tasks: --suite hellaswag,piqa. Several GPUs share the documents:
accelerate launch --config_file accelerate_configs/2gpu_ddp.yaml scripts/run_eval.py runs/modern_124m --suite pretraining
"""

import argparse
import json
import sys

from isoflop.errors import UserError, run_command


def main(argv: list[str] | None = None) -> int:
    """Parse first: lm-eval takes seconds to import."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="runs/NAME, runs/NAME/checkpoints/step-N, a folder with config.json, or user/name")
    parser.add_argument("--suite", default="quick", help="quick (offline), gpt2_zero_shot, pretraining, or TASK,TASK")
    parser.add_argument("--backend", default="hf", help="any of lm-eval's models: hf, vllm, gguf ...")
    parser.add_argument("--model-args", default="", help="as lm-eval has them: dtype=bfloat16,revision=step-5000")
    parser.add_argument("--batch-size", default="8", help="sequences at once, or auto")
    parser.add_argument("--device", help="cuda where there is one, else cpu")
    parser.add_argument("--limit", type=int, help="documents of each task, for a first look")
    parser.add_argument("--metadata", type=mapping, help="""for tasks that read it: '{"file": "mine.jsonl"}'""")
    parser.add_argument("--output", help="folder of the results; a run's own evaluations/SUITE where not given")
    arguments = parser.parse_args(argv)

    from isoflop.evaluate import Request, evaluate_model

    return evaluate_model(Request(**vars(arguments)))


def mapping(text: str) -> dict[str, object]:
    """A JSON object."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"""--metadata {text}: give a JSON object, e.g. '{{"file": "mine.jsonl"}}'""")
    return value


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
