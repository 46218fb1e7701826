"""`python -m isoflop`: the `isoflop` command."""

from isoflop.cli.main import main

main()
