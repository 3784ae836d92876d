"""Behaviors that data cannot express: functions named in the catalogue. Each raises `NotShown` with a one-line reason."""
