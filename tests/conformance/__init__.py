"""What an OpenAI-compatible server has to show, as data, and what judges a server by it.

`python -m tests.conformance --url URL --model MODEL`; knows HTTP and no server in particular.
"""
