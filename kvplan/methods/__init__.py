"""What a cache layer can do: pure tensor code, one method a file."""
