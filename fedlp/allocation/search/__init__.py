"""Search for allocation functions."""
