"""The chat window: reads lines, streams replies. A person in a terminal, or lines from a pipe."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable
from contextlib import closing
from typing import Any

from chatalign.chat.conversation import Conversation
from chatalign.errors import DataError, RecipeError

Read = Callable[[str], str]
Write = Callable[[str], None]
HELP = """/system TEXT  set the system message (without TEXT: take it out)
/reset        start a new conversation
/help         this
/exit         leave (so does Ctrl-D); Ctrl-C stops a reply
A line that starts with // is sent with one slash."""


def chat(
    ref: str,
    *,
    system: str | None = None,
    temperature: float = 0.7,
    top_p: float = 0.95,
    max_new_tokens: int = 512,
    seed: int | None = None,
    read: Read | None = None,
    write: Write | None = None,
) -> None:
    """Talk to a run, an adapter folder, a model folder or a Hub id until the input ends or ``/exit``.

    `read` gives the next line for a prompt text and raises EOFError at the end; `write` shows text. By default they
    are the terminal, or standard input and output without prompts where input is piped. The same `seed` and lines
    give the same replies. Raises RecipeError, ModelError or TemplateError.
    """
    _refuse(temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens)
    at_terminal = read is None and sys.stdin.isatty()
    say = write or _write
    conversation = open_conversation(
        ref, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed
    )
    conversation.system = system
    if at_terminal:
        say(f"{ref} on {_device(conversation)} · /help for commands\n")
    talk(conversation, read or (_read_terminal if at_terminal else _read_pipe), say)


def open_conversation(
    ref: str, *, temperature: float, top_p: float, max_new_tokens: int, seed: int | None
) -> Conversation:
    """Load the model that `ref` names, with its adapter and tokenizer, ready to talk."""
    import torch

    from chatalign.models.adapters import load_inference
    from chatalign.models.load import load_tokenizer, stop_token_ids
    from chatalign.recipe import ModelSection

    section = ModelSection(name_or_path=ref)
    tokenizer = load_tokenizer(section, chat=True)
    model = load_inference(section, tokenizer)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    return Conversation(
        model=model,
        tokenizer=tokenizer,
        stop_token_ids=tuple(stop_token_ids(tokenizer, getattr(model, "generation_config", None))),
        context=getattr(model.config, "max_position_embeddings", None),
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        seed=secrets.randbits(32) if seed is None else seed,
    )


def talk(conversation: Conversation, read: Read, write: Write) -> None:
    """The loop: a line, then a command or a reply, until EOF or ``/exit``."""
    while True:
        try:
            line = read("you> ").strip()
        except EOFError:
            write("\n")
            return
        except KeyboardInterrupt:
            write("\n(/exit or Ctrl-D leaves)\n")
            continue
        if line == "/exit":
            return
        if not line:
            continue
        if line.startswith("/") and not line.startswith("//"):
            write(command(conversation, line) + "\n")
            continue
        # A terminal with another encoding gives lone surrogates, which no tokenizer takes.
        content = line.removeprefix("/") if line.startswith("//") else line
        conversation.turns.append({"role": "user", "content": content.encode("utf-8", "replace").decode()})
        reply(conversation, write)


def command(conversation: Conversation, line: str) -> str:
    """Carry out a line that starts with ``/``; returns what to say about it."""
    name, _, argument = line.partition(" ")
    if name == "/help":
        return HELP
    if name == "/reset":
        conversation.reset()
        return "(a new conversation)"
    if name == "/system":
        conversation.system = argument.strip() or None
        return f"(system message: {conversation.system})" if conversation.system else "(no system message)"
    return f"({name} is no command; /help lists them, and // sends a line that starts with a slash)"


def reply(conversation: Conversation, write: Write) -> None:
    """Stream the reply to the last turn; Ctrl-C breaks it off and keeps what was said."""
    try:
        if dropped := conversation.make_room():
            write(f"(the {dropped} oldest turns no longer fit into {conversation.context} tokens and were dropped)\n")
    except DataError as error:
        write(f"({error})\n")
        return
    with closing(conversation.stream()) as pieces:  # closed at once when broken off: the turn is kept then
        try:
            for piece in pieces:
                write(piece)
        except KeyboardInterrupt:
            write(" (stopped)")
    write("\n")


def _refuse(*, temperature: float, top_p: float, max_new_tokens: int) -> None:
    problem = (
        "--temperature must be 0 or more"
        if temperature < 0
        else "--top-p must lie above 0 and up to 1"
        if not 0 < top_p <= 1
        else "--max-new-tokens must be 1 or more"
        if max_new_tokens < 1
        else None
    )
    if problem:
        raise RecipeError(f"{problem}; mend it and start again")


def _device(conversation: Any) -> str:
    return str(next(conversation.model.parameters()).device)


def _read_terminal(prompt: str) -> str:
    import readline  # noqa: F401 - gives input() line editing and a history

    return input(prompt)


def _read_pipe(_: str) -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def _write(text: str) -> None:
    # Written as bytes that any terminal takes: a pipe with an ASCII locale must not end the chat.
    sys.stdout.write(text.encode(sys.stdout.encoding or "utf-8", "replace").decode(sys.stdout.encoding or "utf-8"))
    sys.stdout.flush()
