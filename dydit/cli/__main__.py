"""``python -m dydit.cli``, the same as ``dydit``."""

import sys

from dydit.cli.app import main

sys.exit(main())
