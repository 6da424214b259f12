"""``python -m terramind_jax COMMAND``, and the installed ``terramind-jax``."""

import sys

from terramind_jax import cli


def run() -> None:
    """Ends this process with the command's exit code, after Ctrl-C at once: threads in the midst of compiling or writing would crash."""
    code = cli.main()
    if code == cli.STOPPED:
        cli.end(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
