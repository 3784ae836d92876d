"""API keys: the file that holds them, and the check of each request's key."""
