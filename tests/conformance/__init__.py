"""The behaviors of an OpenAI-compatible server, as data, and a runner that checks any server for them.

`python -m tests.conformance --url URL --model MODEL`; uses HTTP only and depends on no particular server.
"""
