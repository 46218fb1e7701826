"""From a budget or a recipe to every number of a run, and a recipe that `pretrain` runs. Entered by `command.main`."""
