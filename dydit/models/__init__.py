"""Static backbones."""
