"""One-shot pruning on moments pooled over clients."""
