"""Rows as four libraries take them, and what they mean. Each peer's own documentation names these shapes."""
# ruff: noqa: E501 - a table reads best with a row a line
# fmt: off

from __future__ import annotations

from typing import Any, NamedTuple

from bad_rows import m, sharegpt

from chatalign.data.rows import Conversation, Preference, Prompt, Text, Unpaired


class PeerRow(NamedTuple):
    """A row, what stage reads it, what it has to become, and whether its columns alone say so."""

    peer: str
    kind: Any
    row: dict[str, Any]
    wanted: Any
    says: str | None = None  # the key that the error has to name; None: recognised


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def reply(text: str) -> list[dict[str, Any]]:
    return m(text, first="assistant")


def pair(*prompt: str, raw: bool = False, before: list[Any] | None = None) -> Preference:
    return Preference(prompt=[*(before or []), *m(*prompt)], chosen=reply("yes"), rejected=reply("no"), raw=raw)


TEXT_PAIR = {"chosen": "yes", "rejected": "no"}
TURN_PAIR = {"chosen": reply("yes"), "rejected": reply("no")}
PLAIN = Conversation(messages=m("hi", "yes"))
RAW = Conversation(messages=m("hi", "yes"), first_supervised=1, raw=True)
UP = Unpaired(prompt=m("hi"), completion=reply("yes"), label=True)
RAW_UP = Unpaired(prompt=m("hi"), completion=reply("yes"), label=True, raw=True)

PEER_ROWS = [
    # TRL: dataset formats and types
    PeerRow("trl", "text", {"text": "hi"}, Text(text="hi")),
    PeerRow("trl", "conversation", {"messages": m("hi", "yes")}, PLAIN),
    PeerRow("trl", "prompt", {"prompt": "hi"}, Prompt(prompt=m("hi"), extra={}, raw=True)),
    PeerRow("trl", "prompt", {"prompt": m("hi"), "solution": "4"}, Prompt(prompt=m("hi"), extra={"solution": "4"})),
    PeerRow("trl", "conversation", {"prompt": "hi", "completion": "yes"}, RAW),
    PeerRow("trl", "conversation", {"prompt": m("hi"), "completion": reply("yes")}, Conversation(messages=m("hi", "yes"), first_supervised=1)),
    PeerRow("trl", "preference", {"prompt": "hi", **TEXT_PAIR}, pair("hi", raw=True)),
    PeerRow("trl", "preference", {"prompt": m("hi"), **TURN_PAIR}, pair("hi")),
    PeerRow("trl", "preference", {"chosen": m("hi", "yes"), "rejected": m("hi", "no")}, pair("hi")),
    PeerRow("trl", "unpaired", {"prompt": "hi", "completion": "yes", "label": True}, RAW_UP),
    PeerRow("trl", "unpaired", {"prompt": m("hi"), "completion": reply("yes"), "label": True}, UP),
    PeerRow("trl", "conversation", {"messages": m("hi", "yes"), "tools": '[{"name": "f"}]'}, Conversation(messages=m("hi", "yes"), tools=[{"name": "f"}])),
    PeerRow("trl", "preference", {"prompt": "hi", **TURN_PAIR, "tools": [{"name": "f"}]}, Preference(prompt=m("hi"), chosen=reply("yes"), rejected=reply("no"), tools=[{"name": "f"}])),
    # LLaMA-Factory: alpaca and sharegpt with ranking, kto_tag, OpenAI-style messages
    PeerRow("llamafactory", "conversation", {"instruction": "hi", "input": "", "output": "yes", "system": "", "history": []}, PLAIN),
    PeerRow("llamafactory", "conversation", {"instruction": "add", "input": "1 2", "output": "3", "system": "s", "history": [["a", "b"]]}, Conversation(messages=[system("s"), *m("a", "b", "add\n1 2", "3")])),
    PeerRow("llamafactory", "preference", {"instruction": "add", "input": "1 2", **TEXT_PAIR}, pair("add\n1 2")),
    PeerRow("llamafactory", "preference", {"instruction": "c", "history": [["a", "b"]], "system": "s", **TEXT_PAIR}, pair("a", "b", "c", before=[system("s")])),
    PeerRow("llamafactory", "unpaired", {"instruction": "hi", "input": "", "output": "yes", "kto_tag": True}, UP),
    PeerRow("llamafactory", "unpaired", {"conversations": sharegpt("hi", "yes"), "kto_tag": True}, UP),
    PeerRow("llamafactory", "conversation", {"conversations": sharegpt("hi", "yes"), "system": "s", "tools": ""}, Conversation(messages=[system("s"), *m("hi", "yes")])),
    PeerRow("llamafactory", "preference", {"conversations": sharegpt("a", "b", "c"), "chosen": sharegpt("", "yes")[1], "rejected": sharegpt("", "no")[1]}, pair("a", "b", "c")),
    PeerRow("llamafactory", "conversation", {"messages": [system("s"), *m("hi", "yes")], "images": [], "videos": None, "audios": ""}, Conversation(messages=[system("s"), *m("hi", "yes")])),
    PeerRow("llamafactory", "conversation", {"query": "hi", "response": "yes"}, RAW, "`columns: {prompt: query, completion: response}`"),
    PeerRow("llamafactory", "prompt", {"instruction": "hi"}, Prompt(prompt=m("hi"), extra={}, raw=True), "`columns: {prompt: instruction}`"),
    # Axolotl: instruction formats
    PeerRow("axolotl alpaca_w_system", "conversation", {"system": "s", "instruction": "hi", "output": "yes"}, Conversation(messages=[system("s"), *m("hi", "yes")])),
    PeerRow("axolotl alpaca_chat.load_qa", "conversation", {"question": "hi", "answer": "yes"}, RAW, "`columns: {prompt: question, completion: answer}`"),
    PeerRow("axolotl alpaca_chat.load_camel_ai", "conversation", {"message_1": "hi", "message_2": "yes"}, RAW, "`columns: {prompt: message_1, completion: message_2}`"),
    PeerRow("axolotl gpteacher", "conversation", {"instruction": "add", "input": "1 2", "response": "3"}, Conversation(messages=m("add\n1 2", "3")), "`columns: {output: response}`"),
    PeerRow("axolotl oasst", "conversation", {"INSTRUCTION": "hi", "RESPONSE": "yes"}, RAW, "`columns: {prompt: INSTRUCTION, completion: RESPONSE}`"),
    PeerRow("axolotl summarizetldr", "conversation", {"article": "hi", "summary": "yes"}, RAW, "`columns: {prompt: article, completion: summary}`"),
    PeerRow("axolotl metharme", "conversation", {"prompt": "hi", "generation": "yes"}, RAW, "`columns: {completion: generation}`"),
    PeerRow("axolotl context_qa", "conversation", {"article": "a", "question": "q", "answer": "yes"}, Conversation(messages=m("a\nq", "yes")), "`columns: {instruction: article, input: question, output: answer}`"),
    PeerRow("axolotl context_qa.load_v2", "conversation", {"context": "a", "question": "q", "answer": "yes"}, Conversation(messages=m("a\nq", "yes")), "`columns: {instruction: context, input: question, output: answer}`"),
    PeerRow("axolotl reflection", "conversation", {"instruction": "hi", "input": "", "output": "no", "reflection": "r", "corrected": "yes"}, PLAIN, "`columns: {output: corrected}`"),
    PeerRow("axolotl alpaca_w_system.load_open_orca", "conversation", {"system_prompt": "s", "question": "hi", "response": "yes"}, Conversation(messages=[system("s"), *m("hi", "yes")], first_supervised=2), "`columns: {prompt: question, completion: response, system: system_prompt}`"),
    PeerRow("axolotl pygmalion", "conversation", {"conversations": [{"role": "human", "value": "hi"}, {"role": "bot", "value": "yes"}]}, PLAIN),
    PeerRow("axolotl chat_template", "conversation", {"dialogue": m("hi", "yes")}, PLAIN, "`columns: {messages: dialogue}`"),
    PeerRow("axolotl completion", "text", {"content": "hi"}, Text(text="hi"), "`columns: {text: content}`"),
    # Axolotl: preferences
    PeerRow("axolotl chatml.intel", "preference", {"system": "s", "question": "hi", **TEXT_PAIR}, pair("hi", before=[system("s")]), "`columns: {prompt: question}`"),
    PeerRow("axolotl chatml.icr", "preference", {"system": "s", "input": "hi", **TEXT_PAIR}, pair("hi", before=[system("s")]), "`columns: {prompt: input}`"),
    PeerRow("axolotl chatml", "preference", {"question": "hi", "chosen_response": "yes", "rejected_response": "no"}, pair("hi", raw=True), "`columns: {prompt: question, chosen: chosen_response, rejected: rejected_response}`"),
    PeerRow("axolotl chatml.prompt_pairs", "preference", {"system": None, "prompt": "hi", **TEXT_PAIR}, pair("hi", raw=True)),
    PeerRow("axolotl chatml.ultra", "preference", {"prompt": "hi", "chosen": m("hi", "yes"), "rejected": m("hi", "no")}, pair("hi")),
    PeerRow("axolotl llama3.argilla_chat", "preference", {"chosen": m("hi", "yes"), "rejected": m("hi", "no")}, pair("hi")),
    PeerRow("axolotl dpo.chat_template", "preference", {"messages": m("a", "b", "c"), "chosen": reply("yes")[0], "rejected": reply("no")[0]}, pair("a", "b", "c")),
    PeerRow("axolotl orpo", "preference", {"system": "s", "chosen": m("hi", "yes"), "rejected": m("hi", "no")}, pair("hi", before=[system("s")])),
    PeerRow("axolotl kto.argilla", "unpaired", {"system": "s", "instruction": "hi", "completion": "yes", "label": True}, Unpaired(prompt=[system("s"), *m("hi")], completion=reply("yes"), label=True), "`columns: {prompt: instruction}`"),
    PeerRow("axolotl kto.argilla_chat", "unpaired", {"completion": m("hi", "yes"), "label": True}, UP),
    PeerRow("axolotl kto.intel", "unpaired", {"question": "hi", "completion": "yes", "label": True}, RAW_UP, "`columns: {prompt: question}`"),
    # alignment-handbook and the files it trains on
    PeerRow("handbook ultrafeedback_binarized", "preference", {"prompt": "hi", "prompt_id": "x", "chosen": m("hi", "yes"), "rejected": m("hi", "no"), "messages": m("hi", "yes"), "score_chosen": 8.0, "score_rejected": 2.0}, pair("hi")),
    PeerRow("handbook ultrafeedback_binarized", "conversation", {"prompt": "hi", "chosen": m("hi", "yes"), "rejected": m("hi", "no"), "messages": m("hi", "yes")}, PLAIN, "`format: messages`"),
    PeerRow("preferences, their chosen side", "conversation", {"chosen": m("hi", "yes"), "rejected": m("hi", "no")}, PLAIN, "`columns: {messages: chosen}`"),
    PeerRow("preferences, their chosen side", "conversation", {"prompt": "hi", **TEXT_PAIR}, RAW, "`columns: {completion: chosen}`"),
    PeerRow("preferences, their chosen side", "conversation", {"prompt": m("hi"), **TURN_PAIR}, Conversation(messages=m("hi", "yes"), first_supervised=1), "`columns: {completion: chosen}`"),
    PeerRow("alpaca with text labels", "unpaired", {"instruction": "hi", "output": "yes", "label": "true"}, UP, "`format: unpaired`"),
    PeerRow("alpaca with kinds", "conversation", {"instruction": "hi", "output": "yes", "label": "chat"}, PLAIN),
    PeerRow("handbook ultrachat_200k", "conversation", {"prompt": "hi", "prompt_id": "x", "messages": m("hi", "yes")}, PLAIN),
    PeerRow("handbook OpenHermes-2.5", "conversation", {"conversations": [{"from": "human", "value": "hi", "weight": None}, {"from": "gpt", "value": "yes", "weight": None}], "source": "x"}, PLAIN),
    PeerRow("handbook dpo-mix-7k", "preference", {"dataset": "x", "chosen": m("a", "b", "c", "yes"), "rejected": m("a", "b", "c", "no")}, pair("a", "b", "c")),
    PeerRow("ms-swift", "preference", {"query": "hi", "response": "yes", "rejected_response": "no"}, pair("hi", raw=True), "`columns: {prompt: query, chosen: response, rejected: rejected_response}`"),
    PeerRow("a conversation in CSV", "unpaired", {"completion": '[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]', "label": "1"}, UP),
    PeerRow("Dolly", "conversation", {"instruction": "add", "context": "1 2", "response": "3", "category": "x"}, Conversation(messages=m("add\n1 2", "3")), "`columns: {input: context, output: response}`"),
    PeerRow("Alpaca", "conversation", {"instruction": "hi", "input": "", "output": "yes", "text": "Below is an instruction …"}, PLAIN),
    PeerRow("Alpaca", "text", {"instruction": "hi", "input": "", "output": "yes", "text": "Below …"}, Text(text="Below …"), "`format: text`"),
    PeerRow("OpenAI functions", "conversation", {"messages": m("hi", "yes"), "functions": [{"name": "f", "parameters": {}}]}, Conversation(messages=m("hi", "yes"), tools=[{"name": "f", "parameters": {}}])),
    PeerRow("speakers", "conversation", {"dialog": [{"speaker": "user", "text": "hi"}, {"speaker": "bot", "text": "yes"}]}, PLAIN, "`columns: {messages: dialog, role: speaker, content: text}`"),
    PeerRow("two conversations", "conversation", {"messages": m("hi", "yes"), "conversations": sharegpt("hi", "yes")}, PLAIN, "`format: messages`"),
    PeerRow("two conversations", "unpaired", {"messages": m("hi", "yes"), "prompt": "hi", "completion": "yes", "label": 1}, UP, "`columns: {messages: messages}`"),
    PeerRow("two prompts", "preference", {"messages": m("hi"), "prompt": "hi", **TEXT_PAIR}, pair("hi", raw=True), "`columns: {prompt: prompt}`"),
]

# What no key makes readable: the stage, the row, and what has to be said.
REFUSED = [
    ("preference", {"prompt": "2 + 2?", "completions": ["a", "b"], "labels": [True, False]}, "hold a label for each step (stepwise supervision), which no stage learns from; write each whole reply as a row with prompt, completion and label"),
    ("preference", {"prompt": "hi", "answers": [{"answer": "yes", "rank": 1}]}, "hold several answers to a prompt; write pairs of them as prompt, chosen and rejected"),
    ("preference", {"messages": m("hi", "yes"), "rejected_response": "no"}, "hold a conversation with a second reply beside it; write the conversation with either reply, as chosen and rejected"),
    ("conversation", {"segments": [{"label": False, "text": "hi"}, {"label": True, "text": "yes"}]}, "hold template-free segments, each with its own label; write prompt and completion, with data.apply_chat_template: false"),
    ("conversation", {"input_ids": [1, 2], "labels": [-100, 2], "attention_mask": [1, 1]}, "hold token ids, and chatalign makes its own; give the text that they were made of"),
    ("conversation", {"question": "which?", "choices": ["a", "b"], "solution": "a"}, "hold multiple-choice questions; write the choices into the question, and question and answer as prompt and completion"),
]
