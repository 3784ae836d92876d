"""Nearly valid request bodies."""
