"""Routing decisions: gates, routers and the movement of tokens."""
