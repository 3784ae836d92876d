"""Paths that are served without a key and under any host name; see `api.health`."""

from __future__ import annotations

LIVE_PATH, READY_PATH, REPORT_PATH = "/livez", "/readyz", "/health"
HEALTH_PATHS = (LIVE_PATH, READY_PATH, REPORT_PATH)
"""A probe may have neither a key nor the right host name. They reveal no more than counts."""
