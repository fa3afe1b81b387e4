"""Engines that generate: one small interface, and transformers behind it."""

from chatalign.rollout.interface import Rollout, RolloutEngine, Sampling
from chatalign.rollout.stream import stream_reply
from chatalign.rollout.transformers_engine import TransformersRollout

__all__ = ["Rollout", "RolloutEngine", "Sampling", "TransformersRollout", "stream_reply"]
