"""One request's way through Redis: the queue, the relay of its events, overload, live models."""
