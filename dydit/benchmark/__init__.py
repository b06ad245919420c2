"""``dydit bench``: static backbone, masked model and engine, timed in turns in one process."""
