"""Behaviours that data cannot say: functions named in the catalogue. Each raises `NotShown` with a line of reason."""
