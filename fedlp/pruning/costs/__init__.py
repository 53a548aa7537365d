"""Cost of a model as a function of its widths."""
