"""Models as transformers classes, and what training needs around them. Imports torch, transformers and itself alone."""
