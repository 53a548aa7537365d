"""Secure aggregation: the server learns sums of updates, and no update."""
