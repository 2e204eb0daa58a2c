r"""Teacher traces → pairs to fine-tune on: cleaned and put into one prompt style, or dropped with a reason.

A trace is kept when its answer is whole and right. Sentences about the task instead of the problem ("The user wants
…", "I must put the answer in \boxed{}") are removed, except where the problem itself says so. The teacher's closing
statement is replaced by the one that the prompt style asks for, and the result must be well-formed and right again.

    grpo-gsm8k pairs --traces traces.jsonl --out pairs.jsonl --prompt_style qwen_boxed

writes chat rows (for `r1_zero`, which has no chat turns: prompt, response and `"raw": true`), and beside them
`pairs.report.json`: how many were dropped, for which reason, with an example of each.

Simplified: what is about the task is told by a list of phrases, in English.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from grpo_gsm8k.config import PairsConfig
from grpo_gsm8k.errors import ConfigError, DataError
from grpo_gsm8k.runs.files import read_jsonl, write_json, write_jsonl
from grpo_gsm8k.tasks.base import Tags
from grpo_gsm8k.tasks.gsm8k.grading import extract, grade, parse_number
from grpo_gsm8k.tasks.gsm8k.problems import example_from_row
from grpo_gsm8k.tasks.gsm8k.styles import Style
from grpo_gsm8k.tasks.gsm8k.task import Gsm8k, question_of
from grpo_gsm8k.tasks.render import task_of

EXCERPT = 200  # characters of a dropped trace that the report shows

_META = re.compile(
    r"\b(?:as an ai\b|(?:ai|language) model\b|reason(?:ing)? step by step"
    r"|the user(?:'s)? (?:wants?|asks?|asked|is asking|said|says|query|question|prompt|request|needs?|provided|gave)"
    r"|(?:system|user) prompt|(?:the|these|your|my) instructions?\b"
    r"|(?:required|requested|specified|correct|right|proper) format\b"
    r"|(?:put|place|present|write|give|format|box|enclose)\w* (?:the|my|your|it as the) (?:final )?(?:answer|result)"
    r" (?:in|within|inside|into|as|with|clearly)\b"
    r"|final answer (?:should|must|needs?|has|goes|will|is to) (?:be|to|in)\b)"
    r"|\\boxed\{\s*\}",
    re.IGNORECASE,
)
_SPECIAL_TOKEN = re.compile(r"<[|｜][^<>\n]{1,40}[|｜]>|\[/?INST\]|</?s>")
_BOX_ALONE = re.compile(r"(?:\\\[|\$\$)\s*(\\boxed\{[^\n]*\})\s*\.?\s*(?:\\\]|\$\$)")
_ANSWER_WORDS = re.compile(r"\\boxed|####|\banswer\b", re.IGNORECASE)
_NO_NUMBER = re.compile(
    r"\\boxed|####|\\[\[\]()]|[*_#$`{}]|\b(?:so|thus|therefore|hence|the|final|answer|is|result)\b", re.IGNORECASE
)


class Dropped(NamedTuple):
    """Why a trace gives no pair, and what in it shows that."""

    why: str
    shown: str


def run(cfg: PairsConfig) -> dict[str, Any]:
    """Turn a file of traces into pairs and a report; return the report, which is what the command prints.

    Raises:
        DataError: a fault in the traces, with its line; or not one of them could be kept.
    """
    source, out = Path(cfg.traces), Path(cfg.out)
    if out.resolve() == source.resolve():
        raise ConfigError(f"--out is {out}, which holds the traces themselves; choose another file")
    report = Report()
    task = task_of(cfg)
    if not isinstance(task, Gsm8k):
        raise ConfigError(f"pairs are made of traces of gsm8k; task {task.spec!r} has none")
    write_jsonl(out, keep(source, cfg, task, report))
    beside = out.with_suffix(".report.json")
    counts = {"written": report.written, "read": report.read, "cleaned": report.cleaned}
    said = {**counts, "prompt_style": task.options.prompt_style, "dropped": report.table()}
    write_json(beside, {**said, "source": str(source)})
    return {**said, "path": str(out), "report": str(beside)}


class Report:
    """What became of the traces: counts, and for each reason to drop one the first example."""

    def __init__(self) -> None:
        self.read = self.written = self.cleaned = 0
        self._dropped: dict[str, dict[str, Any]] = {}

    def drop(self, line: int, dropped: Dropped) -> None:
        """One trace fewer."""
        first = {"why": dropped.why, "count": 0, "line": line, "example": dropped.shown[-EXCERPT:]}
        self._dropped.setdefault(dropped.why, first)["count"] += 1

    def table(self) -> list[dict[str, Any]]:
        """Reasons, the most frequent first."""
        return sorted(self._dropped.values(), key=lambda entry: -entry["count"])


def keep(source: Path, cfg: PairsConfig, task: Gsm8k, report: Report) -> Iterator[dict[str, Any]]:
    """The rows of the traces that are kept, in their order."""
    style, tags = task.style, task.options.tags
    seen: set[bytes] = set()
    for line, trace in read_jsonl(source):
        report.read += 1
        try:
            made = make_pair(trace, style, tags, cfg)
        except (ValueError, KeyError) as fault:
            raise DataError(source, f"not a trace: {fault}", line) from None
        if isinstance(made, Dropped):
            report.drop(line, made)
            continue
        print_of = hashlib.sha256(" ".join(f"{made.question}\n{made.response}".casefold().split()).encode()).digest()
        if print_of in seen:
            report.drop(line, Dropped("duplicate", made.response))
            continue
        seen.add(print_of)
        report.written += 1
        report.cleaned += made.cleaned
        yield made.row(style)
    if not report.written:
        reasons = ", ".join(f"{entry['why']} {entry['count']}" for entry in report.table())
        raise DataError(source, f"none of its {report.read} traces can be kept: {reasons}")


@dataclass(frozen=True)
class Pair:
    """A question and the response to learn; `cleaned` when sentences were removed from it."""

    id: str
    sample: int
    question: str
    response: str
    cleaned: bool

    def row(self, style: Style) -> dict[str, Any]:
        """One row of `sft --data_path`, asked as the style asks."""
        who = {"id": self.id, "sample": self.sample}
        asked = style.ask(self.question)
        if isinstance(asked, str):
            return {**who, "prompt": asked, "response": self.response, "raw": True}
        turns = [*asked, ("assistant", self.response)]
        return {**who, "messages": [{"role": role, "content": content} for role, content in turns]}


def make_pair(trace: Mapping[str, Any], style: Style, tags: Tags, cfg: PairsConfig) -> Pair | Dropped:
    """One trace as a pair, or why it gives none.

    Raises:
        ValueError, KeyError: it is no trace of a problem with a reference answer.
    """
    problem = example_from_row({key: trace[key] for key in ("id", "question", "answer")})
    question, gold = question_of(problem), problem.answer
    thought, content = split_thought(trace["reasoning_content"], trace["content"])
    if trace["finish_reason"] != "stop":
        return Dropped("truncated", f"finish_reason {trace['finish_reason']}: {content or thought}")
    if not grade(content, gold, cfg.grading):
        found = extract(content, cfg.grading)
        return Dropped("wrong_answer" if found else "no_answer", f"gold {gold}, said {found}: {content}")
    thinks = cfg.part == "reasoning" or (cfg.part == "auto" and thought and style.plain)
    text = thought if thinks else content
    if _SPECIAL_TOKEN.search(text) or _SPECIAL_TOKEN.search(question):
        return Dropped("special_token", text if _SPECIAL_TOKEN.search(text) else question)
    kept, removed = without_meta(text, question)
    body = without_answer(without_tags(kept, tags), gold)
    if not body:
        return Dropped("no_working", text)
    response = style.reference(f"{body}\n#### {gold}", gold)
    if not (style.format_ok(response) and grade(response, gold, "strict", tags=tags, opened=style.plain)):
        return Dropped("not_in_form", response)
    if not cfg.min_chars <= len(response) <= cfg.max_chars:
        return Dropped("too_short" if len(response) < cfg.min_chars else "too_long", response)
    return Pair(problem.id, trace.get("sample", 0), question, response, bool(removed))


def split_thought(thought: str, content: str) -> tuple[str, str]:
    """Reasoning and content, also where an endpoint leaves the reasoning in the content."""
    inside, closed, rest = content.partition("</think>")
    return (thought or inside.replace("<think>", "").strip(), rest.strip()) if closed else (thought, content)


def without_meta(text: str, question: str) -> tuple[str, int]:
    """The text without the sentences that speak of the task, and their number. The question's own words are no sign."""
    asked = question.casefold()

    def meta(sentence: str) -> bool:
        return any(found.group().casefold() not in asked for found in _META.finditer(sentence))

    lines, removed = [], 0
    for line in text.split("\n"):
        sentences = re.split(r"(?<=[.!?])\s+", line)
        said = [sentence for sentence in sentences if not meta(sentence)]
        removed += len(sentences) - len(said)
        if len(said) == len(sentences):
            lines.append(line)
        elif said:
            lines.append(" ".join(said))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip(), removed


def without_tags(text: str, tags: Tags) -> str:
    """Tags, headings' hashes and `####` are markers of some style; as part of the working they would mislead."""
    for tag in [*vars(tags).values(), *vars(Tags()).values()]:
        text = text.replace(tag, "") if tag else text
    return re.sub(r"^[ \t]*#{1,6}[ \t]+", "", text, flags=re.MULTILINE).replace("####", "")


def without_answer(text: str, gold: str) -> str:
    """The working alone: closing lines that only repeat the answer are removed, boxes further up are unwrapped."""
    lines = _BOX_ALONE.sub(r"\1", text).rstrip().split("\n")
    while lines and (not lines[-1].strip() or _only_the_answer(lines[-1], gold)):
        lines.pop()
    return unboxed("\n".join(lines)).strip()


def _only_the_answer(line: str, gold: str) -> bool:
    if not _ANSWER_WORDS.search(line):
        return False
    rest = _NO_NUMBER.sub(" ", line).strip(" \t.:,=")
    return not rest or parse_number(rest) == parse_number(gold)


def unboxed(text: str) -> str:
    r"""Every `\boxed{…}` replaced by what is in it, braces matched; one that never closes stays."""
    start = text.find("\\boxed{")
    while start >= 0:
        inside, depth = start + len("\\boxed{"), 1
        end = inside
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        if depth:
            return text
        text = text[:start] + text[inside : end - 1] + text[end:]
        start = text.find("\\boxed{", start)
    return text
