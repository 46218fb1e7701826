"""What a budget buys, or what a recipe costs, with every number shown.

python scripts/plan.py recipes/llama2_1.36b.yaml [section.key=value ...]
python scripts/plan.py --flops 1.36e21 --family llama3 --write recipes/mine.yaml
python scripts/plan.py --gpus 2 --gpu a6000 --days 16
python scripts/plan.py --dollars 500 --gpu h100 --price 2.5
python scripts/plan.py compare recipes/gpt2_1.36b.yaml recipes/llama2_1.36b.yaml
python scripts/plan.py models
python scripts/plan.py --parameters 182.4e6 --aspect 32
"""

import sys

from isoflop.errors import run_command
from isoflop.plan.command import main

if __name__ == "__main__":
    run_command(lambda: main(__doc__, sys.argv[1:]))
