"""Where the `kasa` command begins. Next to nothing is loaded before it can be stopped in order."""

from __future__ import annotations

import sys

from pipeline.core import stopping


def start() -> None:
    """Entry point of the `kasa` command."""
    with stopping.on_signals(sys.argv):
        from pipeline.cli.main import main  # takes a second, and several on a busy machine

        main()
