"""A PPO run in a process of its own that sends itself a signal. SIGKILL leaves no time to tidy up."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any

from chatalign import checkpoint, ppo
from chatalign.engine.ppo_trainer import PpoTrainer
from chatalign.errors import Interrupted
from chatalign.recipe import PpoRecipe
from chatalign.rollout.sampler import Sampler

# While replies are drawn, in the middle of an update, and with a checkpoint written but not sealed.
PLACES: dict[str, tuple[Any, str]] = {
    "reply": (Sampler, "draw"),
    "backward": (PpoTrainer, "objective"),
    "save": (checkpoint, "write_manifest"),
}


def at_call(place: str, count: int, end: Callable[[], None]) -> Callable[[], None]:
    """Call `end` on entering the `count`-th call of a place; returns what undoes that."""
    owner, name = PLACES[place]
    right: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            end()
        return right(*args, **kwargs)

    setattr(owner, name, counted)
    return lambda: setattr(owner, name, right)


def run(
    recipe: PpoRecipe,
    environment: Mapping[str, str],
    kill: tuple[str, int] | None = None,
    number: int = signal.SIGKILL,
) -> None:
    """Train in this process, which gets a signal at a place and a count of its calls."""
    os.environ.update(environment)
    if kill is not None:
        at_call(*kill, lambda: os.kill(os.getpid(), number))
    try:
        ppo.run(recipe)
    except Interrupted:
        sys.exit(130)
