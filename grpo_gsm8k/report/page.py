"""The document around every page: head, title, notes, navigation and style."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from grpo_gsm8k.report import figures
from grpo_gsm8k.report.compare import comparison_page
from grpo_gsm8k.report.headline import headline, lead_sentence
from grpo_gsm8k.report.markup import Html, join, tag
from grpo_gsm8k.report.read import Run
from grpo_gsm8k.report.single import facts, run_page


def page(runs: Mapping[str, Run]) -> str:
    """The whole document."""
    first, name = next(iter(runs.values())), " · ".join(runs)
    if len(runs) == 1:
        title, body = headline(first), run_page(first)
        pairs = tag("dl", *(tag("div", tag("dt", k), tag("dd", v)) for k, v in facts(first)), class_="facts")
        said = lead_sentence(first)
        lead = join([tag("p", said, class_="lead") if said else Html(), pairs])
    else:
        title, body = f"{len(runs)} runs side by side", comparison_page(runs)
        lead = tag("ul", *(tag("li", tag("b", one), ": ", headline(run)) for one, run in runs.items()))
    notes = [n if len(runs) == 1 else f"{one}: {n}" for one, run in runs.items() for n in dict.fromkeys(run.notes)]
    return document(name, title, lead, {"Incomplete": notes}, body)


def document(name: str, title: str, lead: Html, notes: Mapping[str, Sequence[str]], body: Html) -> str:
    """A page with its head, its notes and the navigation of its sections.

    Args:
        notes: what the reader must know first, under a word each; those that are empty are left out.
    """
    boxes = [
        tag("div", tag("b", word), tag("ul", *(tag("li", n) for n in said)), class_="notes")
        for word, said in notes.items()
        if said
    ]
    count = itertools.count(1)
    unique = re.compile("<svg role.*?</svg>", re.S)
    body = Html(unique.sub(lambda m: figures.prefix_ids(m[0], f"f{next(count)}-"), body))
    anchors = re.findall(r'<section id="([\w-]+)"><h2>(.*?)</h2>', body)
    links = (tag("a", Html(text.split(":")[0]), href=f"#{anchor}") for anchor, text in anchors)
    nav = tag("nav", *links, aria_label="Sections of this page")
    top = tag("header", tag("p", name, class_="mute"), tag("h1", title), lead, *boxes, nav)
    return _document(f"{title} – {name}", top, body)


def _document(title: str, top: Html, body: Html) -> str:
    style = Path(__file__).with_suffix(".css").read_text("utf-8")
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    head = f"""<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
{tag("title", title)}<style>{style}</style>"""
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{top}\n<main>{body}</main></body></html>\n'
