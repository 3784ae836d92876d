"""The application that gunicorn serves: `gunicorn -c api/gunicorn.conf.py api.asgi:app`."""

from api.app import create_app
from common.settings import Settings

app = create_app(Settings.load())
