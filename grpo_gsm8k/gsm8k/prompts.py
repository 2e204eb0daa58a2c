"""How a problem is asked, how a solution is written, and the one place where ids and mask are born.

A `Style` is a few lines of text; to add one, add an entry to `STYLES`. A `Renderer` binds a style to a
tokenizer. It returns token ids and response mask together, so that nothing downstream has to guess from
text or from padding which tokens are the response's.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_gsm8k.config import PromptConfig
from grpo_gsm8k.datatypes import Problem, Prompt, Rendered, Source, TokenRow
from grpo_gsm8k.errors import ConfigError, DataError
from grpo_gsm8k.gsm8k.grading import Tags, extract, parse_number
from grpo_gsm8k.runs.files import read_json, write_json

Message = tuple[str, str]  # (role, content)
PROMPT_FILE = "prompt.json"
SHOT_BREAK = "\n\n\n"  # between worked examples in plain text; a completion that writes it begins another one
PROBE = "3.14 + 1,234 = $56  costs 7%\n\n\tIt's \\boxed{72}. Größe ½ 数"  # what tokenizers split in different ways


@dataclass(frozen=True)
class Style:
    """One way to ask and to answer.

    Attributes:
        ask: question → chat messages, or → plain text for a model without chat turns.
        reference: problem → the response that a teacher would write, from GSM8K's reference solution.
        format_ok: response → whether it has the form that was asked for, whatever its answer.
        stop: strings that end a completion.
    """

    ask: Callable[[str], list[Message] | str]
    reference: Callable[[Problem], str]
    format_ok: Callable[[str], bool]
    stop: tuple[str, ...] = ()


def working(problem: Problem) -> str:
    """The reference solution without GSM8K's `<<a+b=c>>` annotations and without its `####` line."""
    body = problem.answer.rpartition("####")[0]
    return re.sub(r"<<[^<>\n]*>>", "", body).strip()


def _gsm8k_format_ok(response: str) -> bool:
    last = response.rstrip().rpartition("\n")[2]
    return response.count("####") == 1 and last.startswith("#### ") and parse_number(last[5:]) is not None


def _gsm8k(tags: Tags) -> Style:
    return Style(
        ask=lambda question: [("user", question)],
        reference=lambda problem: problem.answer,
        format_ok=_gsm8k_format_ok,
    )


def _qwen_boxed(tags: Tags) -> Style:
    system = "Please reason step by step, and put your final answer within \\boxed{}."
    return Style(
        ask=lambda question: [("system", system), ("user", question)],
        reference=lambda p: f"{working(p)}\n\nThe final answer is $\\boxed{{{p.gold}}}$.".strip(),
        format_ok=lambda response: "\\boxed{" in response and extract(response, "strict") is not None,
    )


def _r1_zero(tags: Tags) -> Style:
    """Raw text for a base model; the prompt opens the thought, so the response starts inside it."""
    answered = bool(tags.answer_open and tags.answer_close)
    form = f"{tags.think_open} the reasoning {tags.think_close} "
    form += f"{tags.answer_open} the answer {tags.answer_close}" if answered else "the answer within \\boxed{}"

    def ask(question: str) -> str:
        return (
            "A user asks a question and an assistant solves it. The assistant first thinks the reasoning "
            f"through and then gives the answer, in this form: {form}\n"
            f"User: {question}\nAssistant: {tags.think_open}"
        )

    def reference(problem: Problem) -> str:
        gold = (
            f"{tags.answer_open} {problem.gold} {tags.answer_close}"
            if answered
            else f"The final answer is $\\boxed{{{problem.gold}}}$."
        )
        return f" {working(problem)} {tags.think_close} {gold}"

    def format_ok(response: str) -> bool:
        _thought, closed, rest = response.partition(tags.think_close)
        if not closed or tags.think_open in response or tags.think_close in rest:
            return False
        if not answered:
            return "\\boxed{" in rest and extract(rest, "strict", tags=tags) is not None
        rest = rest.strip()
        inner = rest.removeprefix(tags.answer_open or "").removesuffix(tags.answer_close or "")
        return rest == f"{tags.answer_open}{inner}{tags.answer_close}" and not any(
            tag in inner for tag in (tags.answer_open or "", tags.answer_close or "")
        )

    return Style(ask, reference, format_ok, stop=(tags.answer_close,) if answered and tags.answer_close else ())


STYLES: dict[str, Callable[[Tags], Style]] = {"gsm8k": _gsm8k, "qwen_boxed": _qwen_boxed, "r1_zero": _r1_zero}


def make_tags(think_open: str, think_close: str, answer_open: str, answer_close: str) -> Tags:
    """Tags from configured strings; empty answer tags mean think-only. Raises `ConfigError` for half a pair."""
    if not think_open or not think_close or bool(answer_open) != bool(answer_close):
        raise ConfigError("tags come in pairs: think_open with think_close, answer_open with answer_close")
    given = [tag for tag in (think_open, think_close, answer_open, answer_close) if tag]
    if len(set(given)) < len(given):
        raise ConfigError(f"tags must differ from each other: {', '.join(given)}")
    return Tags(think_open, think_close, answer_open or None, answer_close or None)


class Renderer:
    """A style bound to a tokenizer: problems and chats in, token ids with their mask out."""

    def __init__(
        self, tokenizer: Any, style: str = "gsm8k", tags: Tags | None = None, shots: Sequence[Problem] = ()
    ) -> None:
        """`tokenizer` is a transformers tokenizer; `tags` are those of the r1_zero style and of grading.

        Args:
            shots: problems that every prompt shows first, each with its reference solution.
        """
        self.tokenizer, self.name, self.shots = tokenizer, style, tuple(shots)
        self.tags = tags or Tags()
        self.style = STYLES[style](self.tags)
        self.end_id = self._end_of_turn()
        self.special_tokens = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        self.pad_id: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.end_id

    def save_pretrained(self, folder: Path) -> None:
        """The tokenizer, and how this model was asked, so that it is asked the same way next time."""
        self.tokenizer.save_pretrained(folder)
        write_json(folder / PROMPT_FILE, {"prompt_style": self.name, **vars(self.tags)})

    def made_with(self) -> dict[str, str | None]:
        """What rendered ids depend on besides the text: style, tags, and a hash of tokenizer and chat template.

        Where the text is at hand (prepared prompts), this only explains a difference, and the ids decide whether there
        is one. Shards of token ids are held to it.
        """
        ends = [self.end_id, self.tokenizer.bos_token_id, self._encode(PROBE)]
        parts = [sorted(self.tokenizer.get_vocab().items()), self.tokenizer.chat_template, ends]
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        return {"prompt_style": self.name, **vars(self.tags), "tokenizer": digest[:16]}

    def prompt(self, problem: Problem) -> Prompt:
        """What the model sees before it answers.

        Raises:
            DataError: the problem comes with a stored prompt that is not, id for id, what this renderer makes;
                or its question holds a special token.
        """
        prompt, source = self.render(problem), problem.source
        if (
            source
            and (stored := source.rendered)
            and (stored.token_ids, stored.text) != (prompt.token_ids, self.spell(prompt.token_ids))
        ):
            raise DataError(source.path, self._why_not(stored), source.line)
        return prompt

    def render(self, problem: Problem) -> Prompt:
        """The prompt of a problem, whatever is stored with it. Raises `DataError` for a special token in its text."""
        for asked in (problem, *self.shots):
            if found := next((token for token in self.special_tokens if token in asked.question), None):
                what = (
                    f"the question holds {found}, a special token of this model: a prompt that was rendered already "
                    "would be rendered twice; give the bare question, or a set that `grpo-gsm8k prep-eval` made"
                )
                source = asked.source or Source(f"problem {asked.id}", None)
                raise DataError(source.path, what, source.line)
        return Prompt(problem, tuple(self._prompt_ids(self._ask(problem.question))))

    def example(self, problem: Problem) -> TokenRow:
        """A problem with its reference solution; mask 1 on the solution and on the end-of-turn id."""
        prompt = list(self.prompt(problem).token_ids)
        return self._join([(prompt, 0), ([*self._encode(self.style.reference(problem)), self.end_id], 1)])

    def chat(self, messages: Sequence[Message], train_on: str = "last", raw: bool = False) -> TokenRow:
        """A conversation that ends with the assistant.

        Args:
            messages: (role, content) pairs.
            train_on: "last" masks in the last assistant message; "all" every one.
            raw: the first of two messages is the prompt as the model reads it, without a chat's turns.

        The trained part of an assistant message is its content and the end-of-turn id: exactly what a
        sampler would have drawn after the same prompt. Raises `ConfigError` where "all" is asked of a
        chat template that rewrites earlier turns.
        """
        if train_on == "last" or raw:
            prompt = self._prompt_ids(messages[0][1] if raw else list(messages[:-1]))
            return self._join([(prompt, 0), ([*self._encode(messages[-1][1]), self.end_id], 1)])
        parts: list[tuple[list[int], int]] = []
        done = ""
        for i, (role, content) in enumerate(messages):
            if role != "assistant":
                continue
            prefix = self._template(messages[:i], generation=True)
            if not prefix.startswith(done):
                raise ConfigError("this chat template rewrites earlier turns; use train_on = 'last'")
            parts.append((self._encode(prefix[len(done) :]), 0))
            parts.append(([*self._encode(content), self.end_id], 1))
            done = prefix + content + self.tokenizer.decode([self.end_id])
        return self._join(parts)

    @property
    def stop(self) -> tuple[str, ...]:
        """Every string that ends a completion: the style's, and the break after which another example would begin."""
        return (*self.style.stop, SHOT_BREAK) if self.shots and isinstance(self._ask(""), str) else self.style.stop

    @property
    def stop_ids(self) -> frozenset[int]:
        """Every id that ends a completion: the template's end of turn and the tokenizer's own."""
        return frozenset(i for i in (self.end_id, self.tokenizer.eos_token_id) if i is not None)

    def spell(self, token_ids: Sequence[int]) -> str:
        """Text for people, special tokens spelled out."""
        text: str = self.tokenizer.decode(list(token_ids))
        return text

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text for graders and people; special tokens left out."""
        text: str = self.tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text

    def _why_not(self, stored: Rendered) -> str:
        then, now = stored.made_with, self.made_with()
        differ = [f"{key}: {then.get(key)!r} then, {now[key]!r} now" for key in now if then.get(key) != now[key]]
        why = f"was rendered for another model or style ({'; '.join(differ)})" if differ else "has been changed since"
        return f"the prompt {why}; run `grpo-gsm8k prep-eval` again"

    def _ask(self, question: str) -> list[Message] | str:
        """How a question is asked, the shots before it: earlier turns of the chat, or more of the text."""
        asked = self.style.ask(question)
        if not self.shots:
            return asked
        answers = [self.style.reference(shot) for shot in self.shots]
        shown = [self.style.ask(shot.question) for shot in self.shots]
        if isinstance(asked, str) or not self.tokenizer.chat_template:
            texts = [self._plain(a) + answer for a, answer in zip(shown, answers, strict=True)]
            return SHOT_BREAK.join([*texts, self._plain(asked)])
        turns = [[*a, ("assistant", answer)] for a, answer in zip(shown, answers, strict=True)]
        spoken = [message for turn in [*turns, asked] for message in turn]
        return [m for i, m in enumerate(spoken) if m[0] != "system" or i == 0]  # a chat has its system message once

    @staticmethod
    def _plain(asked: Sequence[Message] | str) -> str:
        """As text for a model without chat turns."""
        return asked if isinstance(asked, str) else "\n\n".join(content for _, content in asked) + "\n\nAnswer: "

    def _prompt_ids(self, asked: list[Message] | str) -> list[int]:
        if isinstance(asked, list) and self.tokenizer.chat_template:
            return self._encode(self._template(asked, generation=True))
        bos = self.tokenizer.bos_token_id
        return ([] if bos is None else [bos]) + self._encode(self._plain(asked))

    def _template(self, messages: Sequence[Message], generation: bool) -> str:
        chat = [{"role": role, "content": content} for role, content in messages]
        text: str = self.tokenizer.apply_chat_template(chat, add_generation_prompt=generation, tokenize=False)
        return text

    def _encode(self, text: str) -> list[int]:
        # A template spells its special tokens out, and a second BOS must never appear.
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _end_of_turn(self) -> int:
        """The id that follows an assistant's words: read off the chat template, else the tokenizer's EOS."""
        eos = self.tokenizer.eos_token_id
        if self.tokenizer.chat_template:
            probe = "an answer"
            turn = self._template([("user", "a question"), ("assistant", probe)], generation=False)
            after = self._encode(turn.rpartition(probe)[2].strip())
            if after and after[0] in self.tokenizer.added_tokens_decoder:
                return after[0]
        if eos is None:
            raise ConfigError("this tokenizer has neither an end-of-sequence token nor a chat template with one")
        return int(eos)

    @staticmethod
    def _join(parts: Sequence[tuple[list[int], int]]) -> TokenRow:
        ids = tuple(i for part, _ in parts for i in part)
        return TokenRow(ids, tuple(flag for part, flag in parts for _ in part))


def how_to_ask(cfg: PromptConfig) -> tuple[str, Tags]:
    """Prompt style and tags: as configured, or (auto) as the model folder remembers, else qwen_boxed."""
    tags = make_tags(cfg.think_open, cfg.think_close, cfg.answer_open, cfg.answer_close)
    if cfg.prompt_style != "auto":
        return cfg.prompt_style, tags
    return remembered(cfg.model_id) or ("qwen_boxed", tags)


def remembered(model_id: str) -> tuple[str, Tags] | None:
    """Style and tags that a model folder was trained with; None if it does not say."""
    path = Path(model_id) / PROMPT_FILE
    if not path.is_file():
        return None
    stored = read_json(path)
    style = stored.pop("prompt_style", None)
    if style not in STYLES or stored.keys() != vars(Tags()).keys():
        raise DataError(path, "does not say how the model is asked; pass --prompt_style")
    return style, Tags(**stored)


def check_lengths(prompts: Sequence[Prompt], context: int, source: str) -> None:
    """Raise `DataError` if a prompt leaves no room in the model's context."""
    longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
    length = len(longest.token_ids)
    if length >= context:
        raise DataError(
            source,
            f"problem {longest.problem.id}: a prompt of {length} tokens does not fit into the model's context "
            f"of {context}; leave this problem out, or take another model",
        )
