"""Messages: records, packing, encodings, index sets."""
