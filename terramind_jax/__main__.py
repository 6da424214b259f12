"""``python -m terramind_jax COMMAND``."""

import sys

from terramind_jax.cli import main

sys.exit(main())
