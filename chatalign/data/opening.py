"""Opening a data file: gzip by its name, what its first bytes say that its name doesn't, and errors as DataError."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from chatalign.data.rows import Broken
from chatalign.errors import DataError

# How files begin that are no UTF-8 text. UTF-32's marks come before UTF-16's, with which they begin.
_OTHERS = {
    b"\x1f\x8b": ("gzip", "name it .gz"),
    b"PK\x03\x04": ("a zip archive", "unpack it"),
    b"PAR1": ("parquet", "name it .parquet"),
    b"\xff\xfe\x00\x00": ("UTF-32 text", "save it as UTF-8"),
    b"\x00\x00\xfe\xff": ("UTF-32 text", "save it as UTF-8"),
    b"\xff\xfe": ("UTF-16 text", "save it as UTF-8"),
    b"\xfe\xff": ("UTF-16 text", "save it as UTF-8"),
}


@contextmanager
def open_text(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a text file, unpacked where its name ends in .gz.

    Raises DataError where it can't be read, at once or later, or begins as a file of another kind does.
    """
    try:
        with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb") as file:
            head = file.read(4)
            for mark, (kind, mend) in _OTHERS.items():
                if head.startswith(mark):
                    raise DataError(f"{path}: is {kind} by its first bytes; {mend}")
            if b"\0" in head:
                raise DataError(f"{path}: begins with NUL bytes, as UTF-16 text does; save it as UTF-8")
            file.seek(0)
            yield file  # type: ignore[misc]
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: can't be read ({error}); check the file, or make it again") from None


def foreign_bytes(text: str) -> Broken | None:
    """What is wrong where `text`, decoded with ``surrogateescape``, holds bytes that are no UTF-8."""
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) - 0xDC00
        return Broken("is not UTF-8", f"byte 0x{byte:02x}, character {error.start + 1}", "save the file as UTF-8")
    return None
