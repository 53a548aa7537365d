"""Pruned models as files."""
