"""``python -m chatalign.evaluate RECIPE [key=value ...]``."""

from __future__ import annotations

if __name__ == "__main__":
    from chatalign.launch import stage_main

    stage_main("eval")
