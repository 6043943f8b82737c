"""Results as text and tables. Draws, and computes nothing that a result does not hold."""
