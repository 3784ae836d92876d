"""The contract between the API and the workers: settings, wire types, Redis names, errors, connections, logging."""

import importlib.util
import sys

if importlib.util.find_spec("msgspec") is None:
    # Every command imports this first: a sentence instead of a traceback for the wrong Python.
    sys.exit(
        "mlx-pool: its packages are not installed in this Python; run `make install` once, then use .venv/bin/python"
    )
