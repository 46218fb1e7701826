"""Recipes: their sections, how their files are read, and how errors in them are explained.

recipe       Recipe and its sections, with their checks
recipe_data  the sections on text and tokenizer
loading      load_recipe(): YAML and overrides to a checked Recipe; every error with its key, value and remedy
type_errors  pydantic's rules in plain words
paths        the paths in a recipe
shipped      the files that the package ships
"""
