"""Tables of HTML, as notebooks show them; every text is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def html_table(title: str, headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table with a title, for the `_repr_html_` of an object."""
    from jinja2 import Environment

    template = Environment(autoescape=True).from_string(
        "<p><b>{{ title }}</b></p><table><thead><tr>{% for header in headers %}<th>{{ header }}</th>{% endfor %}"
        "</tr></thead><tbody>{% for row in rows %}<tr>{% for cell in row %}"
        "<td style='text-align: left'>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</tbody></table>"
    )
    return template.render(title=title, headers=headers, rows=list(rows))
