"""Composition roots: from a config to a run, a pruned model, a search, a profile, an export."""
