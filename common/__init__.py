"""What the API and the workers must agree on: settings, wire types, names, errors, connections, logging."""

import importlib.util
import sys

if importlib.util.find_spec("msgspec") is None:
    # Every command comes by here first. Said of the wrong Python, it saves a traceback.
    sys.exit("mlx-pool: this Python has not its packages; run `make install` once, and then .venv/bin/python")
