"""Policies: sub-model and upload set of each client in each round."""
