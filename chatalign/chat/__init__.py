"""Talking to a model in the terminal."""

from chatalign.chat.window import chat

__all__ = ["chat"]
