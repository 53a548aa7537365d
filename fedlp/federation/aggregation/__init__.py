"""Aggregation of partial updates, and server optimizers."""
