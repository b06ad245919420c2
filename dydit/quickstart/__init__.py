"""``dydit quickstart``: the whole method on the shipped digits backbone, in minutes on a CPU."""

from dydit.quickstart.run import run_quickstart

__all__ = ["run_quickstart"]
