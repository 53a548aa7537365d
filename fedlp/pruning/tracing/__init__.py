"""Width axes of a model: found by tracing, and cut along."""
