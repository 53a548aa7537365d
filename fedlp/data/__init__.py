"""Data: examples as whole tensors, and their partition among clients."""
