"""Evaluation: replies to held-out prompts, gold and reward-model scores, win rates, KL, perplexity, text metrics."""

from chatalign.evaluate.stage import run

__all__ = ["main", "run"]


def main() -> None:
    """``python -m chatalign.evaluate RECIPE [key=value ...]``."""
    from chatalign.launch import stage_main

    stage_main("eval", run)
