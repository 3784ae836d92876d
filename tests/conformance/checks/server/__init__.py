"""Checks of the server as such: HTTP, concurrent requests, resumed streams."""
