"""Weights from where users have them: found, read without running code, matched name by name, filled in."""
