"""A run told to a person: a summary on disk, a table for the terminal, figures and a page to open.

``summary`` is the schema, ``storage`` writes and reads it, and everything else (``table``, ``plots``,
``charts``, ``html``) is a function of a summary. No file here needs a model or torch.
"""
