"""The document around every page: head, title, notes, navigation and style."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path

from grpo_gsm8k.report import figures
from grpo_gsm8k.report.compare import comparison_page
from grpo_gsm8k.report.findings import headline, stage_story
from grpo_gsm8k.report.markup import Html, join, tag
from grpo_gsm8k.report.read import Run
from grpo_gsm8k.report.single import facts, run_page


def page(runs: Mapping[str, Run]) -> str:
    """The whole document."""
    first = next(iter(runs.values()))
    if len(runs) == 1:
        title, body = headline(first), run_page(first)
        pairs = tag("dl", *(tag("div", tag("dt", k), tag("dd", v)) for k, v in facts(first)), class_="facts")
        lead = join([tag("p", stage_story(first), class_="lead"), pairs])
    else:
        title, body = f"{len(runs)} runs side by side", comparison_page(runs)
        lead = tag("ul", *(tag("li", tag("b", name), ": ", headline(run)) for name, run in runs.items()))
    notes = [n if len(runs) == 1 else f"{name}: {n}" for name, run in runs.items() for n in dict.fromkeys(run.notes)]
    box = tag("aside", tag("b", "Incomplete"), tag("ul", *(tag("li", n) for n in notes))) if notes else Html()
    count = itertools.count(1)
    unique = re.compile("<svg role.*?</svg>", re.S)
    body = Html(unique.sub(lambda m: figures.prefix_ids(m[0], f"f{next(count)}-"), body))
    anchors = re.findall(r'<section id="([\w-]+)"><h2>(.*?)</h2>', body)
    nav = tag("nav", *(tag("a", Html(text.split(":")[0]), href=f"#{anchor}") for anchor, text in anchors))
    name = " · ".join(runs)
    top = tag("header", tag("p", name, class_="mute"), tag("h1", title), lead, box, nav)
    style = Path(__file__).with_suffix(".css").read_text("utf-8")
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    head = f"""<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
{tag("title", f"{title} – {name}")}<style>{style}</style>"""
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{top}\n<main>{body}</main></body></html>\n'
