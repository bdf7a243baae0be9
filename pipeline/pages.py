"""HTML pages from ``pipeline/templates``: one file each, that needs nothing but itself."""

from __future__ import annotations

from typing import Any

import jinja2


def render(template: str, **values: Any) -> str:
    """A page; every value is escaped unless it is ``Markup``.

    Args:
        template: file name in ``pipeline/templates``.
        values: that it names; a missing one is an error, not an empty text.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
