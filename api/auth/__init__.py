"""API keys: the file of their hashes, and the check of each request's key."""
