"""``python -m mansu_interp``."""

import sys

from .cli.main import main

sys.exit(main())
