"""Facts about the architectures that can be converted."""
