"""Searching for how to spread a model's sparsity: spaces, fitness and the run of ``fedlp-search``."""

from fedlp.searching.running import run_search

__all__ = ["run_search"]
