"""Saliency of units, one criterion a file."""
