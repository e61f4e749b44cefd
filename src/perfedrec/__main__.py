"""``perfedrec``, and ``python -m perfedrec``."""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """The command line. Its modules are imported here, so that Ctrl-C meanwhile is answered as it is later."""
    try:
        from perfedrec.cli import app

        app(prog_name="perfedrec")
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
