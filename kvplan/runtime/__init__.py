"""Applies a policy inside transformers: packed slot pools, one attention function, plain `generate()`."""
