"""``python -m mansu_interp``."""

import sys

from .cli import main

sys.exit(main())
