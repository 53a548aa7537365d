"""Data: examples as whole tensors, and how they are spread over clients."""
