"""Client: app, uploads, store."""
