"""``python -m terramind_jax COMMAND``, and the installed ``terramind-jax``."""

import os
import sys

from terramind_jax.cli import STOPPED, main


def run() -> None:
    """Ends this process with the command's exit code, after Ctrl-C at once: threads in the midst of compiling or writing would crash."""
    code = main()
    if code == STOPPED:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:  # also if whoever read them has gone
            os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
