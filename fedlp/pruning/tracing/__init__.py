"""Width axes of a model: tracing, slicing, cutting."""
