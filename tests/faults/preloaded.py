"""What a forkserver imports once, so that each killed chain starts in a moment."""

import chatalign.dpo
import chatalign.pipeline
import chatalign.ppo
import chatalign.reward
import chatalign.sft

__all__ = ["chatalign"]
