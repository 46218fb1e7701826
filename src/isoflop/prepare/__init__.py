"""Prepare: a recipe's text becomes packed, checksummed windows of token ids. Entered by `command.prepare`."""
