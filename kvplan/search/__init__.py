"""From a profile and a memory target to a policy. The only package that imports optuna."""
