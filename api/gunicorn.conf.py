"""gunicorn's configuration file, for `gunicorn -c api/gunicorn.conf.py api.asgi:app`; the options are made in `api.server`."""

import sys

from api.server import options
from common.errors import StartupError
from common.settings import Settings

try:
    globals().update(options(Settings.load()))
except StartupError as error:
    sys.exit(f"mlx-pool: {error}")
