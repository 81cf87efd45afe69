"""``python -m ti_jax`` is ``ti-jax``."""

import sys

from .cli import main

sys.exit(main())
