"""HTML as values: tags that escape what they hold, and the pieces that every section is built of."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


class Html(str):
    """Text that is markup already and must not be escaped again."""


def tag(name: str, *children: object, **attributes: object) -> Html:
    """`<name …>children</name>`; children are escaped unless they are `Html`."""
    opened = "".join(f' {k.rstrip("_")}="{html.escape(str(v))}"' for k, v in attributes.items() if v)
    body = "".join(c if isinstance(c, Html) else html.escape(str(c)) for c in children)
    return Html(f"<{name}{opened}>{body}</{name}>")


def join(parts: Iterable[Html]) -> Html:
    """The parts, one after the other."""
    return Html("\n".join(parts))


# -- pieces of the page -------------------------------------------------------------------------------


def table(head: Sequence[object], rows: Iterable[Sequence[object]], css: str = "") -> Html:
    """A table that scrolls sideways on its own where the screen is narrow."""
    top = tag("thead", tag("tr", *(tag("th", cell) for cell in head)))
    body = join(tag("tr", *(tag("td", cell) for cell in row)) for row in rows)
    return tag("div", tag("table", top, tag("tbody", body), class_=css), class_="scroll")


def fold(title: object, *body: Html) -> Html:
    """A collapsed section."""
    return tag("details", tag("summary", title), *body)


def preformatted(text: str, most: int = 40_000) -> Html:
    """Text as it is, cut where it is very long."""
    rest = len(text) - most
    return tag("pre", text[:most], f"\n… {rest:,} more characters" if rest > 0 else "")


def frame(title: str, picture: Html, caption: str, wide: bool = True, keys: Iterable[Html] = ()) -> Html:
    """A figure: title, legend, picture and the line that says how to read it."""
    legend, below = tag("div", *keys, class_="keys"), tag("figcaption", caption)
    return tag("figure", tag("h3", title), legend, picture, below, class_="wide" if wide else "")


def section(anchor: str, title: str, *body: Html) -> Html:
    """A titled section, or nothing where it has no content."""
    return tag("section", tag("h2", title), *body, id=anchor) if any(body) else Html()
