"""``python -m chatalign``."""

from chatalign.cli import main

main()
