"""The `isoflop` command: one module a verb, which imports what it runs when it is called."""
