"""Pruning scores, one a file: the same for one-shot pruning and for a client in a round.

:mod:`fedlp.pruning.scores.view` defines the inputs of a score, :mod:`fedlp.pruning.scores.criterion` its protocol.
"""
