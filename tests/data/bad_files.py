"""Whole files that can't be trained on as they are, planted as bytes: the line that each gives, and what a run keeps.

``good`` rows stay where the recipe says ``on_bad_row: drop``, and ``dropped`` are counted; where there are none the
file is refused whole.
"""
# ruff: noqa: E501 - a table reads best with a row a line
# fmt: off

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

U, A = '{"role": "user", "content": "hi"}', '{"role": "assistant", "content": "hello"}'
GOOD = f'{{"messages": [{U}, {A}]}}'
CSV = "prompt,completion\n"


@dataclass(frozen=True)
class BadFile:
    """A file by its name and content; `line` is what is said after its path, with … for what varies by library."""

    title: str
    name: str
    content: bytes | Callable[[Path], Any]
    line: str
    good: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    kind: str = "conversation"

    def write(self, folder: Path) -> Path:
        """The file in `folder`."""
        path = folder / self.name
        if isinstance(self.content, bytes):
            path.write_bytes(self.content)
        else:
            self.content(path)
        return path


def lines(*rows: str) -> bytes:
    """JSON lines."""
    return "".join(f"{row}\n" for row in rows).encode("utf-8", "surrogatepass")


def turn(content: str, role: str = "assistant") -> str:
    """A conversation in which one content is written as it stands."""
    return f'{{"messages": [{U}, {{"role": "{role}", "content": {content}}}]}}'


def parquet(columns: dict[str, Any]) -> Callable[[Path], None]:
    """A parquet file of these columns."""
    def write(path: Path) -> None:
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return write


def cut(content: Callable[[Path], None], share: float) -> Callable[[Path], None]:
    """The file without its end."""
    def write(path: Path) -> None:
        content(path)
        whole = path.read_bytes()
        path.write_bytes(whole[: int(share * len(whole))])
    return write


def invalid_text(path: Path) -> None:
    """Three rows of text of which the second is not UTF-8, as some writers let pass."""
    import pyarrow.parquet
    offsets, data = pyarrow.py_buffer(bytes([0, 0, 0, 0, 2, 0, 0, 0, 4, 0, 0, 0, 6, 0, 0, 0])), pyarrow.py_buffer(b"hih\xe9hi")
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, [None, offsets, data])
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), path)


def two_columns(path: Path) -> None:
    """A parquet file in which two columns have one name."""
    import pyarrow.parquet
    columns = [pyarrow.array(["hi"]), pyarrow.array(["hello"]), pyarrow.array(["other"])]
    pyarrow.parquet.write_table(pyarrow.table(columns, names=["prompt", "completion", "prompt"]), path)


def flipped(path: Path) -> None:
    """A parquet file with its head and foot whole, and noise between."""
    parquet({"text": [f"document {i}" * 9 for i in range(500)]})(path)
    whole = bytearray(path.read_bytes())
    whole[4:400] = bytes(255 - byte for byte in whole[4:400])
    path.write_bytes(whole)


def folder(**files: bytes) -> Callable[[Path], None]:
    """A folder of files."""
    def write(path: Path) -> None:
        path.mkdir()
        for name, content in files.items():
            (path / name.replace("_", ".")).write_bytes(content)
    return write


PAIR = '{"prompt": "x", "chosen": "a", "rejected": "b"}'
DEEP = "[" * 100_000 + "]" * 100_000
SCHEMA = '{"name": "f", "parameters": ' + '{"a": ' * 150 + "1" + "}" * 151
TOOLS = f'{GOOD[:-1]}, "tools": [{SCHEMA}]}}'

FILES = [
    # JSON lines: what is no JSON, or JSON that Python reads in silence
    BadFile("broken JSON", "f.jsonl", lines(GOOD, '{"messages": [', GOOD), ":2: broken JSON (Expecting value, column 15) → mend or delete this row", 2, {"broken JSON": 1}),
    BadFile("cut off at the end", "f.jsonl", lines(GOOD, GOOD)[:-9], ":2: broken JSON (Unterminated string starting at, column 83) → mend or delete this row", 1, {"broken JSON": 1}),
    BadFile("trailing comma", "f.jsonl", lines(GOOD, GOOD[:-1] + ",}", GOOD), ":2: broken JSON (…) → mend or delete this row", 2, {"broken JSON": 1}),
    BadFile("single quotes", "f.jsonl", lines(GOOD, GOOD.replace('"', "'"), GOOD), ":2: broken JSON (Expecting property name enclosed in double quotes, column 2) → mend or delete this row", 2, {"broken JSON": 1}),
    BadFile("Python's True", "f.jsonl", lines(GOOD, GOOD[:-1] + ', "ok": True}', GOOD), ":2: broken JSON (Expecting value, column 100) → mend or delete this row", 2, {"broken JSON": 1}),
    BadFile("a comment", "f.jsonl", lines("// rows", GOOD), ":1: broken JSON (Expecting value, column 1) → mend or delete this row", 1, {"broken JSON": 1}),
    BadFile("two objects on a line", "f.jsonl", lines(GOOD, GOOD + GOOD, GOOD), ":2: broken JSON (Extra data, column 93) → write one object a line", 2, {"broken JSON": 1}),
    BadFile("text after the object", "f.jsonl", lines(GOOD, GOOD + " x"), ":2: broken JSON (Extra data, column 94) → write one object a line", 1, {"broken JSON": 1}),
    BadFile("an object over several lines", "f.jsonl", json.dumps(json.loads(GOOD), indent=1).encode() + b"\n" + lines(GOOD), ":1: broken JSON (Expecting property name enclosed in double quotes, column 2) → mend or delete this row", 1, {"broken JSON": 12}),
    BadFile("line break inside a text", "f.jsonl", lines(GOOD, turn('"a\nb"')), ":2: broken JSON (Unterminated string starting at, column 83) → mend or delete this row", 1, {"broken JSON": 2}),
    BadFile("a tab inside a text", "f.jsonl", lines(GOOD, turn('"a\tb"')), ":2: broken JSON (Invalid control character at, column 85) → mend or delete this row", 1, {"broken JSON": 1}),
    BadFile("NUL byte inside a text", "f.jsonl", lines(GOOD, turn('"a\0b"')), ":2: broken JSON (Invalid control character at, column 85) → mend or delete this row", 1, {"broken JSON": 1}),
    BadFile("NUL bytes between rows", "f.jsonl", lines(GOOD, "\0\0\0", GOOD), ":2: broken JSON (Expecting value, column 1) → mend or delete this row", 2, {"broken JSON": 1}),
    BadFile("escaped NUL", "f.jsonl", lines(GOOD, turn(r'"a\u0000b"')), ":2: messages[1].content: holds a NUL character → take it out (character 2)", 1, {"messages[1].content: holds a NUL character": 1}),
    BadFile("high half of a surrogate pair", "f.jsonl", lines(GOOD, turn(r'"a\ud83d"'), GOOD), ":2: messages[1].content: holds half of a surrogate pair → write the whole character (\\ud83d, character 2, is one half)", 2, {"messages[1].content: holds half of a surrogate pair": 1}),
    BadFile("low half of a surrogate pair", "f.jsonl", lines(GOOD, turn(r'"\ude00 a"')), ":2: messages[1].content: holds half of a surrogate pair → write the whole character (\\ude00, character 1, is one half)", 1, {"messages[1].content: holds half of a surrogate pair": 1}),
    BadFile("half a pair in a role", "f.jsonl", lines(GOOD, turn('"a"', r"assistant\ud83d")), ":2: messages[1].role: holds half of a surrogate pair → write the whole character (\\ud83d, character 10, is one half)", 1, {"messages[1].role: holds half of a surrogate pair": 1}),
    BadFile("half a pair in a tool's schema", "f.jsonl", lines(GOOD, GOOD[:-1] + r', "tools": [{"name": "\udfff"}]}'), ":2: tools[0].name: holds half of a surrogate pair → write the whole character (\\udfff, character 1, is one half)", 1, {"tools[0].name: holds half of a surrogate pair": 1}),
    BadFile("half a pair in a tools string", "f.jsonl", lines(GOOD, GOOD[:-1] + r', "tools": "[{\"name\": \"\\ud800\"}]"}'), ":2: tools[0].name: holds half of a surrogate pair → write the whole character (\\ud800, character 1, is one half)", 1, {"tools[0].name: holds half of a surrogate pair": 1}),
    BadFile("column twice", "f.jsonl", lines(GOOD, '{"messages": [], ' + GOOD[1:], GOOD), ":2: messages: stands twice in one object → keep one", 2, {"messages: stands twice in one object": 1}),
    BadFile("key twice in a turn", "f.jsonl", lines(GOOD, GOOD.replace('"role": "user"', '"role": "system", "role": "user"')), ":2: role: stands twice in one object → keep one", 1, {"role: stands twice in one object": 1}),
    BadFile("key twice in a tools string", "f.jsonl", lines(GOOD, GOOD[:-1] + r', "tools": "{\"name\": \"f\", \"name\": \"g\"}"}'), ":2: tools: is a string of JSON in which name: stands twice in one object → keep one", 1, {"tools: is a string of JSON in which name: stands twice in one object": 1}),
    BadFile("NaN", "f.jsonl", lines(GOOD, GOOD[:-1] + ', "score": NaN}'), ":2: NaN is not JSON → write null, or leave the key out", 1, {"NaN is not JSON": 1}),
    BadFile("-Infinity for text", "f.jsonl", lines(GOOD, turn("-Infinity")), ":2: -Infinity is not JSON → write null, or leave the key out", 1, {"-Infinity is not JSON": 1}),
    BadFile("a number of 5,000 digits", "f.jsonl", lines(GOOD, GOOD[:-1] + ', "id": ' + "7" * 5000 + "}"), ":2: a number of more than 1000 digits → write it as text", 1, {"a number of more than 1000 digits": 1}),
    BadFile("lists 100,000 deep", "f.jsonl", lines(GOOD, f'{{"messages": {DEEP}}}'), ":2: is nested more than 100 levels deep → flatten it", 1, {"is nested more than 100 levels deep": 1}),
    BadFile("lists 150 deep", "f.jsonl", lines(GOOD, f'{{"messages": {DEEP[-100_150:-99_850]}}}'), ":2: messages: is nested more than 100 levels deep → flatten it", 1, {"messages: is nested more than 100 levels deep": 1}),
    BadFile("a tool's schema 150 deep", "f.jsonl", lines(GOOD, TOOLS), ":2: tools: is nested more than 100 levels deep → flatten it", 1, {"tools: is nested more than 100 levels deep": 1}),
    BadFile("numbers for rows", "f.jsonl", lines(GOOD, "3", GOOD), ":2: holds an int, not an object → mend or delete this row", 2, {"holds an int, not an object": 1}),
    BadFile("null for a row", "f.jsonl", lines(GOOD, "null"), ":2: holds null, not an object → mend or delete this row", 1, {"holds null, not an object": 1}),
    BadFile("a list for a row", "f.jsonl", lines(GOOD, f"[{U}, {A}]"), ":2: holds a list, not an object → write one object a line, or name a file of one list .json", 1, {"holds a list, not an object": 1}),
    BadFile("a JSON list over lines", "f.jsonl", f"[{GOOD},\n{GOOD}]\n".encode(), ":1: begins a JSON list in a file of JSON lines → name it .json"),
    BadFile("a JSON list on one line", "f.jsonl", f"[{GOOD}, {GOOD}]\n".encode(), ":1: holds a list, not an object → write one object a line, or name a file of one list .json"),
    BadFile("carriage returns alone", "f.jsonl", lines(GOOD, GOOD).replace(b"\n", b"\r"), ":1: broken JSON (Extra data, column 94) → write one object a line"),
    # encodings
    BadFile("Latin-1", "f.jsonl", lines(GOOD) + turn('"caf\xe9"').encode("latin-1") + b"\n" + lines(GOOD), ":2: is not UTF-8 (byte 0xe9, character 87) → save the file as UTF-8", 2, {"is not UTF-8": 1}),
    BadFile("UTF-16", "f.jsonl", GOOD.encode("utf-16"), ": is UTF-16 text by its first bytes; save it as UTF-8"),
    BadFile("UTF-16 without its mark", "f.jsonl", GOOD.encode("utf-16-le"), ": begins with NUL bytes, as UTF-16 text does; save it as UTF-8"),
    BadFile("UTF-32", "f.jsonl", GOOD.encode("utf-32"), ": is UTF-32 text by its first bytes; save it as UTF-8"),
    BadFile("surrogates as bytes", "f.jsonl", lines(GOOD, turn('"a\ud83d"')), ":2: is not UTF-8 (byte 0xed, character 85) → save the file as UTF-8", 1, {"is not UTF-8": 1}),
    BadFile("byte order mark twice", "f.jsonl", b"\xef\xbb\xbf\xef\xbb\xbf" + lines(GOOD, GOOD), ":1: begins with a byte order mark → take it out (joined files leave one in the middle)", 1, {"begins with a byte order mark": 1}),
    BadFile("byte order mark of a joined file", "f.jsonl", lines(GOOD) + b"\xef\xbb\xbf" + lines(GOOD), ":2: begins with a byte order mark → take it out (joined files leave one in the middle)", 1, {"begins with a byte order mark": 1}),
    BadFile("Latin-1 text", "f.txt", "hello\ncaf\xe9\n".encode("latin-1"), ":2: is not UTF-8 (byte 0xe9, character 4) → save the file as UTF-8", 1, {"is not UTF-8": 1}, kind="text"),
    BadFile("NUL in a text", "f.txt", b"hello\na\0b\n", ":2: text: holds a NUL character → take it out (character 2)", 1, {"text: holds a NUL character": 1}, kind="text"),
    BadFile("UTF-16 text", "f.txt", "hello\n".encode("utf-16"), ": is UTF-16 text by its first bytes; save it as UTF-8", kind="text"),
    # json
    BadFile("list cut off", "f.json", f"[{GOOD}, {GOOD}, ".encode(), ":3: broken JSON (Expecting value, line 1 column 190) → mend or delete this row"),
    BadFile("row of a list broken", "f.json", f'[{GOOD},\n{{"messages": }},\n{GOOD}]'.encode(), ":2: broken JSON (Expecting value, line 2 column 14) → mend or delete this row"),
    BadFile("key twice in a list's row", "f.json", f'[{GOOD}, {{"messages": 1, {GOOD[1:]}, {GOOD}]'.encode(), ":2: messages: stands twice in one object → keep one", 2, {"messages: stands twice in one object": 1}),
    BadFile("NaN in a list's row", "f.json", f'[{GOOD}, {{"score": NaN}}, {GOOD}]'.encode(), ":2: NaN is not JSON → write null, or leave the key out", 2, {"NaN is not JSON": 1}),
    BadFile("other things in a list", "f.json", f'[{GOOD}, 3, null, "x", [], {GOOD}]'.encode(), ":2: holds an int, not an object → mend or delete this row", 2, {"holds a list, not an object": 1, "holds a str, not an object": 1, "holds an int, not an object": 1, "holds null, not an object": 1}),
    BadFile("Latin-1 in a list's row", "f.json", f'[{GOOD}, {turn(chr(34) + "caf" + chr(0xe9) + chr(34))}, {GOOD}]'.encode("latin-1"), ":2: is not UTF-8 (byte 0xe9, character 87) → save the file as UTF-8", 2, {"is not UTF-8": 1}),
    BadFile("key twice in the rows of an object", "f.json", f'{{"version": 2, "data": [{GOOD}, {{"a": 1, "a": 2}}, {GOOD}]}}'.encode(), ":2: a: stands twice in one object → keep one", 2, {"a: stands twice in one object": 1}),
    BadFile("an object with two lists of rows", "f.json", f'{{"train": [{GOOD}], "test": [{GOOD}]}}'.encode(), ': a JSON object without one list of rows; write a list, or {"data": […]}'),
    BadFile("two lists under one key", "f.json", f'{{"data": [{GOOD}], "data": [{GOOD}]}}'.encode(), ": data: stands twice in one object → keep one"),
    BadFile("NaN alone", "f.json", b"NaN", ": holds no JSON, not a list of rows; write a list of objects"),
    BadFile("an object of columns", "f.json", b'{"prompt": ["a"], "completion": ["b"]}', ': a JSON object without one list of rows; write a list, or {"data": […]}'),
    BadFile("deep lists in a list", "f.json", f"[{GOOD}, {DEEP}]".encode(), ":2: is nested more than 100 levels deep → flatten it"),
    BadFile("UTF-16 list", "f.json", f"[{GOOD}]".encode("utf-16"), ": is UTF-16 text by its first bytes; save it as UTF-8"),
    BadFile("no rows", "f.json", b"[]", ": holds no rows; give a file with at least one"),
    BadFile("a number", "f.json", b"3", ": holds an int, not a list of rows; write a list of objects"),
    # zero rows
    BadFile("empty file", "f.jsonl", b"", ": holds no rows; give a file with at least one"),
    BadFile("empty .json", "f.json", b"", ": holds no rows; give a file with at least one"),
    BadFile("blank lines only", "f.jsonl", b"\n  \n\r\n\n", ": holds no rows; give a file with at least one"),
    BadFile("a byte order mark alone", "f.txt", b"\xef\xbb\xbf", ": holds no rows; give a file with at least one", kind="text"),
    BadFile("a header alone", "f.csv", CSV.encode(), ": holds no rows; give a file with at least one"),
    BadFile("empty csv", "f.csv", b"", ": holds no rows; give a file with at least one"),
    BadFile("a folder with nothing", "rows", folder(), ": holds no data files; expected .json, …"),
    BadFile("a folder of other files", "rows", folder(README_md=b"# Rows"), ": holds no data files; expected .json, …"),
    BadFile("a folder with one bad file", "rows", folder(a_jsonl=lines(GOOD), b_jsonl=lines(GOOD, "{")), "/b.jsonl:2: broken JSON (Expecting property name enclosed in double quotes, column 2) → mend or delete this row", 2, {"broken JSON": 1}),
    BadFile("parquet of no rows", "f.parquet", parquet({"text": []}), ": holds no rows; give a file with at least one", kind="text"),
    # csv
    BadFile("too few fields", "f.csv", f"{CSV}a,b\nc\nd,e\n".encode(), ":2: has another number of fields than the header (1, not 2) → mend or delete this row", 2, {"has another number of fields than the header": 1}),
    BadFile("too many fields", "f.csv", f"{CSV}a,b\nc,d,e\n".encode(), ":2: has another number of fields than the header (3, not 2) → mend or delete this row", 1, {"has another number of fields than the header": 1}),
    BadFile("a quote that isn't closed", "f.csv", f'{CSV}a,b\n"c,d\ne,f\n'.encode(), ":2: broken CSV (a quote opens in line 3 and isn't closed in it) → close it"),
    BadFile("a quote in the header", "f.csv", b'"prompt,completion\na,b\n', ": header: broken CSV (…) → mend it"),
    BadFile("a quote closed rows later", "f.csv", f'{CSV}a,b\n"c,d\ne,"f"\n'.encode(), ":2: broken CSV (a quote opens in line 3 and isn't closed in it) → close it"),
    BadFile("text behind a quote", "f.csv", f'{CSV}a,b\n"c"x,d\ne,f\n'.encode(), ":2: broken CSV (…, line 3) → mend or delete this row", 2, {"broken CSV": 1}),
    BadFile("two columns alike", "f.csv", b"prompt,completion,prompt\na,b,c\n", ": header: two columns are named 'prompt' → rename one"),
    BadFile("semicolons", "f.csv", b"prompt;completion\na;b\n", ": header: columns stand apart by ';' → write commas"),
    BadFile("tabs", "f.csv", b"prompt\tcompletion\na\tb\n", ": header: columns stand apart by '\\t' → write commas"),
    BadFile("Latin-1 cell", "f.csv", f"{CSV}a,b\nc,caf\xe9\n".encode("latin-1"), ":2: is not UTF-8 (byte 0xe9, character 5) → save the file as UTF-8", 1, {"is not UTF-8": 1}),
    BadFile("Latin-1 header", "f.csv", "prompt,r\xe9ponse\na,b\n".encode("latin-1"), ": header: is not UTF-8 (byte 0xe9, character 8) → save the file as UTF-8"),
    BadFile("UTF-16 from a spreadsheet", "f.csv", f"{CSV}a,b\n".encode("utf-16"), ": is UTF-16 text by its first bytes; save it as UTF-8"),
    BadFile("NUL in a cell", "f.csv", f"{CSV}a,b\nc,d\0\n".encode(), ":2: completion: holds a NUL character → take it out (character 2)", 1, {"completion: holds a NUL character": 1}),
    BadFile("byte order mark twice in csv", "f.csv", b"\xef\xbb\xbf\xef\xbb\xbf" + f"{CSV}a,b\n".encode(), ": header: begins with a second byte order mark → take it out"),
    BadFile("an empty cell", "f.csv", f"{CSV}a,b\nc,\n".encode(), ':2: completion: is missing, not a list of turns → write [{"role": "user", "content": "…"}, …]', 1, {"completion: is missing, not a list of turns": 1}),
    BadFile("broken JSON in a cell", "f.csv", f'messages\n"{GOOD[13:-1].replace(chr(34), chr(34) * 2)}"\n"[{{""role"": "\n'.encode(), ":2: messages: is a string of broken JSON → mend it (Expecting value at character 10)", 1, {"messages: is a string of broken JSON": 1}),
    # compressed
    BadFile("gzip cut off", "f.jsonl.gz", gzip.compress(lines(*[GOOD] * 50))[:-30], ": can't be read (…); check the file, or make it again"),
    BadFile("gzip without its end", "f.jsonl.gz", gzip.compress(lines(GOOD))[:-8], ": can't be read (…); check the file, or make it again"),
    BadFile("gzip of another sum", "f.jsonl.gz", gzip.compress(lines(GOOD))[:-8] + b"\0" * 8, ": can't be read (…); check the file, or make it again"),
    BadFile("gzip with noise inside", "f.jsonl.gz", gzip.compress(lines(GOOD))[:12] + b"\xff" * 40, ": can't be read (…); check the file, or make it again"),
    BadFile("no gzip", "f.jsonl.gz", lines(GOOD), ": can't be read (…); check the file, or make it again"),
    BadFile("gzip by another name", "f.jsonl", gzip.compress(lines(GOOD)), ": is gzip by its first bytes; name it .gz"),
    BadFile("a zip archive", "f.jsonl", b"PK\x03\x04\x14\x00", ": is a zip archive by its first bytes; unpack it"),
    BadFile("gzip in gzip", "f.json.gz", gzip.compress(gzip.compress(lines(GOOD))), ": is gzip by its first bytes; name it .gz"),
    # parquet
    BadFile("no parquet", "f.parquet", lines(GOOD), ": not a readable parquet file (…); write it again"),
    BadFile("empty parquet", "f.parquet", b"", ": not a readable parquet file (…); write it again"),
    BadFile("parquet cut off", "f.parquet", cut(parquet({"text": ["a"] * 99}), 0.7), ": not a readable parquet file (…); write it again", kind="text"),
    BadFile("parquet with noise inside", "f.parquet", flipped, ": not a readable parquet file (…); write it again", kind="text"),
    BadFile("parquet by another name", "f.jsonl", parquet({"text": ["a"]}), ": is parquet by its first bytes; name it .parquet", kind="text"),
    BadFile("numbers for text", "f.parquet", parquet({"prompt": ["a", "b"], "completion": [1, 2]}), ':1: completion: is an int, not a list of turns → write [{"role": "user", "content": "…"}, …]'),
    BadFile("bytes for text", "f.parquet", parquet({"text": [b"a", b"b"]}), ":1: text: is a bytes, not text → write a string", kind="text"),
    BadFile("a null row", "f.parquet", parquet({"text": ["a", None, "c"]}), ":2: text: is missing → write a string", 2, {"text: is missing": 1}, kind="text"),
    BadFile("null turns", "f.parquet", parquet({"messages": [json.loads(GOOD)["messages"], [None, None]]}), ':2: messages[0]: is missing, not a turn → write {"role": …, "content": …}', 1, {"messages[0]: is missing, not a turn": 1}),
    BadFile("null contents", "f.parquet", parquet({"messages": [json.loads(GOOD)["messages"], [{"role": "user", "content": None}]]}), ":2: messages[0].content: is missing, not text → write a string", 1, {"messages[0].content: is missing, not text": 1}),
    BadFile("a column all null", "f.parquet", parquet({"prompt": ["a", "b"], "completion": [None, None]}), ":1: completion: is null → write it, or take the row out"),
    BadFile("turns by columns", "f.parquet", parquet({"messages": [{"role": ["user", "assistant"], "content": ["hi", "hello"]}]}), ":1: messages[0].role: ['user', 'assistant'] is not a known role → use user, assistant, system or tool"),
    BadFile("NUL in parquet", "f.parquet", parquet({"text": ["a", "b\0"]}), ":2: text: holds a NUL character → take it out (character 2)", 1, {"text: holds a NUL character": 1}, kind="text"),
    BadFile("parquet text that isn't UTF-8", "f.parquet", invalid_text, ":2: holds text that is not UTF-8 → write its text again as UTF-8", 2, {"holds text that is not UTF-8": 1}, kind="text"),
    BadFile("two parquet columns alike", "f.parquet", two_columns, ": two columns are named 'prompt' → rename one"),
    # rows of which some are of another kind
    BadFile("another schema half-way", "f.jsonl", lines(GOOD, GOOD, '{"instruction": "x", "output": "y"}'), ':3: messages: is missing, not a list of turns → write [{"role": "user", "content": "…"}, …]', 2, {"messages: is missing, not a list of turns": 1}),
    BadFile("a row of another schema first", "f.jsonl", lines('{"question": "x"}', GOOD, GOOD), ":1: no format has the columns `question`; this stage needs demonstrations (messages, conversations, instruction/output or prompt/completion): say `format` and `columns`"),  # it tells the format
    BadFile("a row of nulls first", "f.jsonl", lines('{"messages": null}', GOOD), ":1: messages: is null → write it, or take the row out", 1, {"messages: is missing, not a list of turns": 1}),
    BadFile("an empty object first", "f.jsonl", lines("{}", GOOD), ":1: columns: the row has none → take it out", 1, {"messages: is missing, not a list of turns": 1}),
    BadFile("a column all null in lines", "f.jsonl", lines('{"messages": null}', '{"messages": null}'), ":1: messages: is null → write it, or take the row out"),
    BadFile("columns that mean nothing", "f.jsonl", lines('{"a": 1}'), ":1: no format has the columns `a`; this stage needs demonstrations (messages, conversations, instruction/output or prompt/completion): say `format` and `columns`"),
    BadFile("demonstrations for pairs", "f.jsonl", lines(GOOD), ":1: this stage needs preference pairs (chosen and rejected), and the file holds messages rows (columns `messages`); give another file, or say `format` and `columns`", kind="preference"),
    BadFile("pairs that aren't", "f.jsonl", lines(PAIR, PAIR.replace('"b"', '"a"'), PAIR.replace('"b"', "[]")), ":2: rejected: is the same as chosen → give two different replies, or take the row out", 1, {"chosen: is a str, not a list of turns": 1, "rejected: is the same as chosen": 1}, kind="preference"),
    BadFile("conversations as text", "f.jsonl", lines(GOOD, '{"messages": "user: hi"}'), ':2: messages: is a str, not a list of turns → write [{"role": "user", "content": "…"}, …]', 1, {"messages: is a str, not a list of turns": 1}),
    BadFile("conversations as broken JSON text", "f.jsonl", lines(GOOD, r'{"messages": "[{\"role\": \"user\""}'), ":2: messages: is a string of broken JSON → mend it (Expecting ',' delimiter at character 16)", 1, {"messages: is a string of broken JSON": 1}),
    BadFile("another kind of file", "f.xlsx", b"PK\x03\x04", ": not a data file by its name; expected .json, …"),
]
