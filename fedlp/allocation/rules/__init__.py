"""Allocation rules: per-layer sparsity from layer statistics."""
