"""A PPO run in a process of its own that kills itself, as ``python interrupted_run.py RECIPE PLACE COUNT [RANK]``.

PLACE is where: ``reply`` (while replies are drawn), ``backward`` (in the middle of an update), ``save`` (with half a
checkpoint written) or ``never``; COUNT is at which of its calls. SIGKILL leaves no time to tidy up.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from chatalign import checkpoint, ppo
from chatalign.engine.ppo_trainer import PpoTrainer
from chatalign.recipe import PpoRecipe
from chatalign.recipe.load import load_recipe
from chatalign.rollout.sampler import Sampler

PLACES: dict[str, tuple[Any, str]] = {
    "reply": (Sampler, "draw"),
    "backward": (PpoTrainer, "objective"),
    "save": (checkpoint, "write_manifest"),
}


def kill_at(place: str, count: int) -> None:
    """SIGKILL to this process on entering the `count`-th call."""
    owner, name = PLACES[place]
    right: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def killed(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return right(*args, **kwargs)

    setattr(owner, name, killed)


def main(path: str, place: str, count: str, rank: str = "") -> None:
    """Run the recipe, with the kill on one rank alone where it is given."""
    recipe = load_recipe(path)
    assert isinstance(recipe, PpoRecipe)
    if place != "never" and rank in ("", os.environ.get("RANK", "0")):
        kill_at(place, int(count))
    ppo.run(recipe)


if __name__ == "__main__":
    main(*sys.argv[1:])
