"""Self-contained HTML pages in one style: no script, nothing from a network, light and dark."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def render_page(template: str, filters: Mapping[str, Callable[..., Any]] = {}, /, **values: Any) -> str:
    """A template of this folder, filled. All values are escaped: rows and replies may hold anything."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("chatalign.report", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters.update(filters)
    return environment.get_template(template).render(**values)
