"""``chatalign inspect``: the rows as the model will see them, and what became of the others."""

from chatalign.preview.page import MAX_ROWS, MAX_TOKENS, write_page
from chatalign.preview.rows import Preview, preview
from chatalign.preview.terminal import print_preview

__all__ = ["MAX_ROWS", "MAX_TOKENS", "Preview", "preview", "print_preview", "write_page"]
