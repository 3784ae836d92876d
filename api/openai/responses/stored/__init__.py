"""Stored responses: how requests refer to them, and the endpoints that read, cancel and delete them."""
