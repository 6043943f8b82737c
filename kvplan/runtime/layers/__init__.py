"""Cache layers, one storage shape a file."""
