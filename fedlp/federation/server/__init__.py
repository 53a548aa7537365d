"""Server: round, roster, state, run directory."""
