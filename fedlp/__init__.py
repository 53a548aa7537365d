"""fedlp: federated learning in which pruning is a first-class part of every round."""

__version__ = "0.1.0"
