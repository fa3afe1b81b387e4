"""``torchrun … killed_rank.py RECIPE``: SFT in several processes; `CHATALIGN_KILL` says which is killed, and where."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from killed_chain import Kill, Points  # beside this file

from chatalign import sft
from chatalign.launch import stage_main

if __name__ == "__main__":
    kill = json.loads(os.environ["CHATALIGN_KILL"])
    if kill is not None and kill.pop("rank") == int(os.environ["RANK"]):
        Points(Path(sys.argv[1]).parent, Kill(**kill)).install()
    stage_main("sft", sft.run, sys.argv[1:])
