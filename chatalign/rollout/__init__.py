"""Engines that generate: one small interface, and transformers or vLLM behind it."""

from chatalign.rollout.interface import Rollout, RolloutEngine, Sampling
from chatalign.rollout.stream import stream_reply
from chatalign.rollout.transformers_engine import TransformersRollout
from chatalign.rollout.vllm_client import VllmClient
from chatalign.rollout.vllm_colocate_engine import VllmColocateRollout, VllmSettings
from chatalign.rollout.vllm_server_engine import VllmServerRollout

__all__ = [
    "Rollout",
    "RolloutEngine",
    "Sampling",
    "TransformersRollout",
    "VllmClient",
    "VllmColocateRollout",
    "VllmServerRollout",
    "VllmSettings",
    "stream_reply",
]
