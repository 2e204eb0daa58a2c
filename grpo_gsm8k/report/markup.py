"""HTML as values: tags that escape what they hold, and the pieces that every section is built of."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


class Html(str):
    """Text that is markup already and must not be escaped again."""


def tag(name: str, *children: object, **attributes: object) -> Html:
    """`<name …>children</name>`; children are escaped unless they are `Html`, and `aria_label` is `aria-label`."""
    opened = "".join(f' {k.rstrip("_").replace("_", "-")}="{html.escape(str(v))}"' for k, v in attributes.items() if v)
    body = "".join(c if isinstance(c, Html) else html.escape(str(c)) for c in children)
    return Html(f"<{name}{opened}>{body}</{name}>")


def join(parts: Iterable[Html]) -> Html:
    """The parts, one after the other."""
    return Html("\n".join(parts))


# -- pieces of the page -------------------------------------------------------------------------------


def region(label: str, *body: Html, css: str = "scroll") -> Html:
    """What scrolls on its own where the screen is narrow; the keyboard reaches it, and a screen reader names it."""
    return tag("div", *body, class_=css, role="region", aria_label=label, tabindex="0")


def table(caption: str, head: Sequence[object], rows: Iterable[Sequence[object]]) -> Html:
    """A table that scrolls sideways on its own; the first cell of each row is the row's heading.

    Args:
        caption: above the table, and the name of its region: no two on a page are alike.
    """
    top = tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in head)))
    lines = []
    for first, *rest in rows:
        heading = tag("th", tag("span", first), scope="row")
        lines.append(tag("tr", heading, *(tag("td", cell) for cell in rest)))
    body = tag("table", tag("caption", caption), top, tag("tbody", join(lines)))
    return region(caption, body)


def fold(title: object, *body: Html) -> Html:
    """A collapsed section."""
    return tag("details", tag("summary", title), *body)


def preformatted(text: str, most: int = 40_000) -> Html:
    """Text as it is, cut where it is very long."""
    rest = len(text) - most
    return tag("pre", text[:most], f"\n… {rest:,} more characters" if rest > 0 else "")


def mark(sign: str) -> Html:
    """A sign for the eye; the words beside it say the same."""
    return tag("span", sign, class_="mark", aria_hidden="true")


def frame(title: str, picture: Html, caption: str, wide: bool = True, keys: Iterable[Html] = ()) -> Html:
    """A figure: title, legend, picture and the line that says how to read it."""
    legend, below = tag("div", *keys, class_="keys"), tag("figcaption", caption)
    return tag("figure", tag("h3", title), legend, picture, below, class_="wide" if wide else "")


def section(anchor: str, title: str, *body: Html) -> Html:
    """A titled section, or nothing where it has no content."""
    return tag("section", tag("h2", title), *body, id=anchor) if any(body) else Html()
