"""Pruning scores, one a file: the same for one-shot pruning and for a client in a round.

:mod:`fedlp.pruning.scores.view` says what a score sees, :mod:`fedlp.pruning.scores.criterion` what is asked of it.
"""
