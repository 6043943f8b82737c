"""The plan as data: what each layer keeps, the file that says so, and the exact bytes that follow. Loads no model."""
