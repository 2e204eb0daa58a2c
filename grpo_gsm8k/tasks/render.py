"""Binds a task to a tokenizer: the only place that turns text into token ids and their mask.

A `Renderer` gets prompt and reference answer from its task, and returns ids and mask together, so nothing downstream
has to guess from text or padding which tokens belong to the response.

A trained row consists of the prompt's ids, as a sampler sees them, and the ids that the sampler would have to draw so
that the chat reads as the model's chat template renders it. If the rendered chat does not start with the prompt, no
such row exists, and the renderer refuses the example.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from grpo_gsm8k.config import TASK_SETTINGS, PromptConfig
from grpo_gsm8k.datatypes import Datum, Example, Message, Prompt, Rendered, Source
from grpo_gsm8k.errors import ConfigError, DataError, ModelError
from grpo_gsm8k.runs.files import read_json, write_json
from grpo_gsm8k.runs.progress import say
from grpo_gsm8k.tasks import load_task
from grpo_gsm8k.tasks.base import Author, Tags, Task, TaskOptions, after_opened_thought, make_tags

GRADING = ("grading", "format_weight", "answer_weight", "grader_processes", "grader_timeout_s")
"""Settings of every task's grades, by their names in the config and in `TaskOptions`."""
PROMPT_FILE = "prompt.json"
SHOT_BREAK = "\n\n\n"  # between worked examples in plain text; a completion that writes it starts another example
DATE = "2024-07-26"
"""The default date of chat templates: a constant, so that the ids are the same on every day. Llama 3's templates
have the same default."""
PROBE = "3.14 + 1,234 = $56  costs 7%\n\n\tIt's \\boxed{72}. Größe ½ 数"  # what tokenizers split in different ways


_UNKNOWN_THOUGHT = re.compile(
    r"(?:<[^<>/\s]*(?:think|thought|reason)[^<>/\s]*>|\[(?:THINK|THOUGHT|REASON\w*)\])\s*$", re.I
)
_READS_DATE = re.compile(r"\b(?:strftime_now|date_string)\b")
_PROBE_CHAT = (("user", "a question"), ("assistant", "an answer"))


class Renderer:
    """Renders examples and chats of a task into token ids with their mask."""

    def __init__(self, tokenizer: Any, task: Task, shots: Sequence[Example] = (), date: str = DATE) -> None:
        """`tokenizer` is a transformers tokenizer.

        Args:
            shots: examples with their reference answers, shown at the start of every prompt.
            date: for chat templates that write the date; a run and its continuations use the same.

        Raises:
            ModelError: the chat template is broken or renders nothing usable.
        """
        self.tokenizer, self.task, self.shots = tokenizer, task, tuple(shots)
        self.tags, self.date = task.options.tags, date
        self._now = parse_date(date)
        added = tokenizer.added_tokens_decoder
        self._special_ids = {i for i, t in added.items() if t.special}
        self._special_tags = {i for i in self._special_ids if added[i].content in vars(self.tags).values()}
        self._turn_end, self._header = "", ""  # what a template writes behind an answer, and before one
        self.end_id = self._end_of_turn()
        self._ends_turns = self.end_id in self._encode(self._turn_end)
        self.special_tokens = self._control_tokens()
        self.pad_id: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.end_id
        self.opens_thought = task.plain or self._template_opens_thought()

    @classmethod
    def of(cls, cfg: PromptConfig, tokenizer: Any, shots: Sequence[Example] = ()) -> Renderer:
        """The renderer of a config: task, style and date as given, or as stored in the model folder."""
        return cls(tokenizer, task_of(cfg), shots, date_of(cfg))

    def as_json(self) -> dict[str, Any]:
        """Task, options, folder and date as JSON, for another process with the same tokenizer."""
        folder = str(self.task.folder) if self.task.folder else None
        return {"task": self.task.spec, "options": asdict(self.task.options), "folder": folder, "date": self.date}

    @classmethod
    def of_json(cls, tokenizer: Any, stored: Mapping[str, Any]) -> Renderer:
        """Undo `as_json`; without shots."""
        options = TaskOptions(**{**stored["options"], "tags": Tags(**stored["options"]["tags"])})
        task = load_task(stored["task"], options)
        task.folder = Path(stored["folder"]) if stored["folder"] else None
        return cls(tokenizer, task, date=stored["date"])

    @property
    def reads_date(self) -> bool:
        """Whether the chat template writes the date."""
        return bool(_READS_DATE.search(self._template_text))

    def save_pretrained(self, folder: Path) -> None:
        """Save the tokenizer, and the prompt settings, so that later commands render the same prompts."""
        self.tokenizer.save_pretrained(folder)
        write_json(folder / PROMPT_FILE, {"task": self.task.spec, **self._asked(), **self._dated()})

    def made_with(self) -> dict[str, str | None]:
        """What the ids depend on besides the text: style, tags, date, and a hash of tokenizer and chat template.

        For stored prompts, which have their text, the ids decide, and this only explains a difference. Shards of token
        ids must match it.
        """
        ends = [self.end_id, self.tokenizer.bos_token_id, self._encode(PROBE)]
        parts = [sorted(self.tokenizer.get_vocab().items()), self.tokenizer.chat_template, ends]
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        task = {"task": self.task.spec} if self.task.spec != DEFAULT_TASK else {}
        return {**task, **self._asked(), "tokenizer": digest[:16], **self._dated()}

    def _asked(self) -> dict[str, str | None]:
        """Style and tags, as stored in the model folder."""
        return {"prompt_style": self.task.options.prompt_style, **vars(self.tags)}

    def check(self, example: Example | None = None, target: bool = False) -> str:
        """Check the template: render a prompt and, with `target`, a reference answer. Returns a summary in one line.

        Args:
            example: by default the task's own, if it has one.

        Raises:
            ModelError: the template cannot be used; says why.
        """
        example = example or self.task.probe()
        if example is None:
            return f"turns end with {self.spell([self.end_id])}"
        prompt = self.render(example)
        if self.render(example) != prompt:
            raise ModelError(f"{self._named}: renders the same prompt in two ways; no run could be repeated")
        found = [f"a prompt of {len(prompt.token_ids)} tokens", f"turns end with {self.spell([self.end_id])}"]
        found += ["it opens a thought"] if prompt.opened else []
        found += [f"it writes the date, {self.date}"] if self.reads_date else []
        if target:
            try:
                row = self.target(example)
            except DataError as fault:
                raise ModelError(f"no reference solution can be trained: {fault.what}") from None
            assert row.token_ids[: len(prompt.token_ids)] == prompt.token_ids and row.token_ids[-1] == self.end_id
            found.append(f"a reference solution of {sum(row.mask)} tokens")
        return ", ".join(found)

    def prompt(self, example: Example) -> Prompt:
        """The prompt of an example, as the model sees it.

        Raises:
            DataError: the example comes with a stored prompt that is not, id for id, what this renderer makes;
                or its text holds a control token.
        """
        prompt, source = self.render(example), example.source
        if (
            source
            and (stored := source.rendered)
            and (stored.token_ids, stored.text) != (prompt.token_ids, self.spell(prompt.token_ids))
        ):
            raise DataError(source.path, self._why_not(stored), source.line)
        return prompt

    def render(self, example: Example) -> Prompt:
        """Render an example's prompt, ignoring a stored one. Raises `DataError` for a control token in its text."""
        for shown in (example, *self.shots):
            self._check_texts_of(shown)
        source, asked = _source(example), self._ask(example)
        if isinstance(asked, str) or not self._template_text:
            text = self._plain(asked)
            opened = self.tags.think_open if text.rstrip().endswith(self.tags.think_open) else ""
            return Prompt(example, tuple(self._plain_ids(text)), opened)
        text = self._row_template(asked, True, source)
        opened = self._opening(text, asked[-1][1])
        if not text.endswith(self._header) and bool(opened) != self.opens_thought:
            raise _refused(
                source,
                f"{self._named} opens a thought for some questions and not for others, so that answers could not be "
                "told from thoughts; take this one out, or pass another --prompt_style",
            )
        return Prompt(example, tuple(self._encode(text)), opened)

    def _check_texts_of(self, example: Example) -> None:
        """Raise `DataError` for a control token in the question or the answer."""
        texts = [example.messages] if isinstance(example.messages, str) else [text for _, text in example.messages]
        for text in texts:
            if found := self._control_token(text):
                raise _refused(
                    _source(example),
                    f"the question holds {found}, a special token of this model: a prompt that was rendered already "
                    "would be rendered twice; give the bare question, or a set that `grpo-gsm8k prep-eval` made",
                )
        for answer in (example.answer, example.meta.get("solution")):
            if isinstance(answer, str) and (found := self._control_token(answer)):
                what = f"the answer holds {found}, a special token of this model, not text; remove it"
                raise _refused(_source(example), what)

    def target(self, example: Example) -> Datum:
        """An example with its reference answer; the mask is 1 on the answer and its end-of-turn id.

        With several turns, it is 0 on the environment's.
        """
        prompt = list(self.prompt(example).token_ids)
        asked, turns = self._ask(example), self._turns(example)
        answer = "".join(text for _, text in turns)
        if isinstance(asked, str) or not self._template_text:
            response = self._continued(self._plain(asked), prompt, answer, _source(example))
            row = self._join([(prompt, 0), (response, 1)])
        else:
            row = self._trained([*asked, ("assistant", answer)], [len(asked)], _source(example))
        return row if len(turns) == 1 else self._in_turns(row, prompt, turns, _source(example))

    def _in_turns(self, row: Datum, prompt: list[int], turns: Sequence[tuple[Author, str]], source: Source) -> Datum:
        """The row of several turns. Each turn is tokenised on its own and continues the ids of the turns before it."""
        said = "".join(text for _, text in turns)
        before, found, after = self.spell(row.token_ids[len(prompt) :]).partition(said)
        texts = [text for _, text in turns]
        texts[0], texts[-1] = before + texts[0], texts[-1] + after
        parts = [(self._encode(text), int(author == "model")) for text, (author, _) in zip(texts, turns, strict=True)]
        joined = self._join([(prompt, 0), *parts])
        if not found or self.spell(joined.token_ids) != self.spell(row.token_ids):
            raise _refused(source, f"{self._named} does not render this answer as it is written; it has several turns")
        return joined

    def reply(self, prompt: Prompt, token_ids: Sequence[int], text: str) -> tuple[int, ...]:
        """The ids of an environment's answer, to append to the prompt and the sampled ids.

        If the model ended its turn, the answer becomes a user message, and the chat template opens the next turn. If a
        stop string of the task ended it, or without a template, the answer follows directly. The sampled ids stay
        unchanged, and the next turn continues them.
        """
        ended = token_ids[-1] in self.stop_ids
        if not ended or not self._template_text or isinstance(self._ask(prompt.example), str):
            return tuple(self._encode(text))
        (_, question), (_, answer) = _PROBE_CHAT
        source = _source(prompt.example)
        chat = [*_PROBE_CHAT, ("user", text)]
        tail = self._row_template(chat, True, source).rpartition(answer)[2] if answer not in text else ""
        ids = self._encode(tail)
        if not tail or question in tail or text.strip() not in tail:
            raise _refused(source, f"{self._named} does not render a second turn; this task has several")
        return tuple(ids[1:] if ids[0] == token_ids[-1] else ids)

    def chat(
        self, messages: Sequence[Message], train_on: str = "last", raw: bool = False, source: Source | None = None
    ) -> Datum:
        """A conversation that ends with the assistant.

        Args:
            messages: (role, content) pairs.
            train_on: "last" trains the last assistant message, "all" every one.
            raw: the first of the two messages is the prompt's plain text, without chat turns.
            source: file and line, for the error message.

        Raises:
            ConfigError: `train_on="all"` with a chat template that rewrites earlier turns.
            DataError: a text holds a control token, or the template renders the answer in another place.
        """
        source = source or Source("this chat", None)
        self.check_texts(messages, raw, source)
        said = [i for i, (role, _) in enumerate(messages) if role == "assistant"]
        if raw or not self._template_text:
            if train_on == "all" and len(said) > 1:
                raise ConfigError("this model has no chat template; use train_on = 'last'")
            text = messages[0][1] if raw else self._plain(messages[:-1])
            prompt = self._plain_ids(text)
            return self._join([(prompt, 0), (self._continued(text, prompt, messages[-1][1], source), 1)])
        return self._trained(messages, said[-1:] if train_on == "last" else said, source)

    def conversation(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The ids of a chat that the assistant answers next.

        Raises:
            DataError: a text holds a control token, or the template does not render this chat.
        """
        source = Source("this conversation", None)
        self.check_texts(messages, False, source)
        if not self._template_text:
            return tuple(self._plain_ids(self._plain(messages)))
        return tuple(self._encode(self._row_template(messages, True, source)))

    def check_texts(self, messages: Sequence[Message], raw: bool, source: Source) -> None:
        """Raise `DataError` for a control token in a message. A raw prompt is rendered text, which has some."""
        for i, (role, content) in enumerate(messages):
            if raw and i == 0:
                continue
            if found := self._control_token(content):
                where = "the response" if raw else f"message {i + 1} ({role})"
                what = "it would be read as the model's own control token and forge a turn; take it out"
                raise _refused(source, f"{where} holds {found}, a special token of this model: {what}")

    @property
    def stop(self) -> tuple[str, ...]:
        """The strings that end a completion: the task's, and the separator of worked examples."""
        return (
            (*self.task.stop, SHOT_BREAK)
            if self.shots and (self.task.plain or not self._template_text)
            else self.task.stop
        )

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end a completion: the template's end of turn and the tokenizer's EOS."""
        return frozenset(i for i in (self.end_id, self.tokenizer.eos_token_id) if i is not None)

    def spell(self, token_ids: Sequence[int]) -> str:
        """Decode with special tokens, for people."""
        text: str = self.tokenizer.decode(list(token_ids))
        return text

    def decode(self, token_ids: Sequence[int]) -> str:
        """Decode without special tokens, for graders and people; keeps the tags, which grading needs."""
        if self._special_tags:
            left_out = set(self.tokenizer.all_special_ids) | self._special_ids
            token_ids = [i for i in token_ids if i not in left_out or i in self._special_tags]
        text: str = self.tokenizer.decode(list(token_ids), skip_special_tokens=not self._special_tags)
        return text

    def _why_not(self, stored: Rendered) -> str:
        then, now = stored.made_with, self.made_with()
        differ = [f"{key}: {then.get(key)!r} then, {now[key]!r} now" for key in now if then.get(key) != now[key]]
        why = f"was rendered for another model or style ({'; '.join(differ)})" if differ else "has been changed since"
        return f"the prompt {why}; run `grpo-gsm8k prep-eval` again"

    def _prompt_of(self, example: Example) -> list[Message] | str:
        with self.task.guarded():
            asked = self.task.prompt(example)
        if isinstance(asked, str) or (all(isinstance(m, tuple) and len(m) == 2 for m in asked) and asked):
            return asked
        raise ConfigError(
            f"task {self.task.spec!r}: prompt() must return text, or (role, content) pairs, not {asked!r}"
        )

    def _answer(self, example: Example) -> str:
        return "".join(text for _, text in self._turns(example))

    def _turns(self, example: Example) -> list[tuple[Author, str]]:
        with self.task.guarded():
            turns = self.task.target_turns(example)
        for _, text in turns:
            if not isinstance(text, str):
                raise ConfigError(f"task {self.task.spec!r}: target() must return text, not {text!r}")
        return turns

    def _ask(self, example: Example) -> list[Message] | str:
        """The question behind its shots: as earlier turns of the chat, or as plain text."""
        asked = self._prompt_of(example)
        if not self.shots:
            return asked
        answers = [self._answer(shot) for shot in self.shots]
        shown = [self._prompt_of(shot) for shot in self.shots]
        if isinstance(asked, str) or not self.tokenizer.chat_template:
            texts = [self._plain(a) + answer for a, answer in zip(shown, answers, strict=True)]
            return SHOT_BREAK.join([*texts, self._plain(asked)])
        turns = [[*a, ("assistant", answer)] for a, answer in zip(shown, answers, strict=True)]
        spoken = [message for turn in [*turns, asked] for message in turn]
        return [m for i, m in enumerate(spoken) if m[0] != "system" or i == 0]  # a chat has its system message once

    @staticmethod
    def _plain(asked: Sequence[Message] | str) -> str:
        """As plain text, for a model without a chat template."""
        return asked if isinstance(asked, str) else "\n\n".join(content for _, content in asked) + "\n\nAnswer: "

    # ------------------------------------------------------------------------------------------ plain text

    def _plain_ids(self, text: str) -> list[int]:
        bos = self.tokenizer.bos_token_id
        return ([] if bos is None else [bos]) + self._encode(text)

    def _continued(self, text: str, prompt: list[int], answer: str, source: Source) -> list[int]:
        """The ids of an answer behind a plain prompt, as a sampler would draw them, with the end of the turn.

        If the ids of the whole text start with the prompt's, the rest are the answer's. Otherwise a token spans the end
        of the prompt; then the answer is tokenised behind a short text whose end no token spans. On its own, the answer
        would start with the blank that SentencePiece puts before every text.
        """
        whole = self._plain_ids(text + answer)
        if whole[: len(prompt)] == prompt:
            return [*whole[len(prompt) :], self.end_id]
        for anchor in ("\n", ".", "a", "▁"):
            head, both = self._encode(anchor), self._encode(anchor + answer)
            if both[: len(head)] == head:
                return [*both[len(head) :], self.end_id]
        raise _refused(source, "the tokenizer merges the start of the response with the text before it")

    # ----------------------------------------------------------------------------------------------- chats

    def _trained(self, messages: Sequence[Message], said: Sequence[int], source: Source) -> Datum:
        """A rendered conversation; the mask is 1 on the assistant messages at the indices `said`."""
        ids: list[int] = []
        mask: list[int] = []
        for i in said:
            prompt = self._row_template(messages[:i], True, source)
            whole = self._turn(messages[: i + 1], prompt, source)
            known, row = self._encode(prompt), self._encode(whole)
            if known[: len(ids)] != ids or (row[: len(known)] != known and i != said[-1]):
                raise ConfigError("this chat template rewrites earlier turns; use train_on = 'last'")
            if row[: len(known)] != known:
                raise _refused(source, self._no_prefix(prompt, whole))
            if self.opens_thought and after_opened_thought(whole.removeprefix(prompt), self.tags) is None:
                raise _refused(
                    source,
                    f"{self._named} opens a thought in the prompt ({prompt[-20:]!r}), and the rendered answer does not "
                    "close it: the answer would be learned as a thought; give pairs with thoughts",
                )
            end = next((k for k in range(len(known), len(row)) if row[k] == self.end_id), None)
            row = row[: end + 1] if end is not None else [*row, self.end_id]
            mask += [0] * (len(known) - len(ids)) + [1] * (len(row) - len(known))
            ids = row
        return Datum(tuple(ids), tuple(mask))

    def _turn(self, messages: Sequence[Message], prompt: str, source: Source) -> str:
        """The rendered text of a conversation whose last message is trained.

        A message with its own thought must contain it once: as the template renders it; else with the thought passed
        separately; else as the message behind the thought that the prompt opens.
        """
        content = messages[-1][1]
        whole = self._row_template(messages, False, source)
        if not self._ends_turns:  # the template has no end-of-turn token, so EOS ends the turn
            whole = whole.removesuffix(self._turn_end)
        opening, closing = self.tags.think_open, self.tags.think_close
        if not content.lstrip().startswith(opening) or closing not in content:
            return whole
        thought, _, answer = content.lstrip().removeprefix(opening).partition(closing)
        apart = {"reasoning_content": thought.strip("\n"), "content": answer.lstrip("\n")}
        for text in (whole, self._row_template(messages, False, source, apart)):
            added = text.removeprefix(prompt)
            once = added.count(opening) + self.opens_thought == 1 and thought.strip() in added
            if text.startswith(prompt) and once:
                return text
        blank = prompt[prompt.rindex(opening) + len(opening) :] if self.opens_thought else ""
        rest = content.lstrip().removeprefix(opening).removeprefix(blank) if self.opens_thought else content
        return prompt + rest + (self._turn_end if self._ends_turns else "")

    def _no_prefix(self, prompt: str, whole: str) -> str:
        """The error for a rendered conversation that does not start with its prompt."""
        if whole.startswith(prompt):
            return (
                f"a token of the rendered conversation runs over the end of the prompt ({prompt[-20:]!r}), so a "
                "sampler that is given the prompt would never draw it; begin the response with a word, or, where the "
                "prompt opens a thought, with one"
            )
        opened = f" opens a thought ({prompt[-20:]!r}) that" if self.opens_thought else ""
        at = next(
            (i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), min(len(prompt), len(whole))
        )
        return (
            f"{self._named}: the prompt{opened} is not the start of the rendered conversation: {prompt[at:][:30]!r} "
            f"in the prompt, {whole[at:][:30]!r} in the conversation; it cannot be fine-tuned on"
            + ("; give pairs with thoughts" if self.opens_thought else "")
        )

    def _row_template(
        self, messages: Sequence[Message], generation: bool, source: Source, last: dict[str, str] | None = None
    ) -> str:
        """Like `_template`, but an error names the row."""
        try:
            return self._template(messages, generation, last)
        except ModelError as fault:
            raise _refused(source, str(fault)) from None

    def _template(self, messages: Sequence[Message], generation: bool, last: dict[str, str] | None = None) -> str:
        """Render messages with the chat template. Without a system role, the system text precedes the first question.

        Args:
            last: replaces keys of the last message.
        """
        messages = list(messages)
        if len(messages) > 1 and messages[0][0] == "system" and not self._takes_system:
            (_, system), (role, content) = messages[:2]
            messages[:2] = [(role, f"{system}\n\n{content}")]
        chat = [{"role": role, "content": content} for role, content in messages]
        if last:
            chat[-1] |= last
        return self._apply(chat, generation)

    def _apply(self, chat: list[dict[str, str]], generation: bool) -> str:
        """Render a chat with jinja. Raises `ModelError` for any error of the template."""
        from jinja2 import TemplateError

        date = {"strftime_now": self._now.strftime, "date_string": self._now.strftime("%d %b %Y")}
        try:
            text: str = self.tokenizer.apply_chat_template(
                chat, add_generation_prompt=generation, tokenize=False, **(date if self.reads_date else {})
            )
        except (
            TemplateError,
            ValueError,
            TypeError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as e:
            roles = ", ".join(message["role"] for message in chat)
            said = " ".join(str(e).split())[:200] or type(e).__name__
            raise ModelError(
                f"{self._named} fails on a chat of {roles}: {said}; fix chat_template.jinja in the model's folder"
            ) from None
        return text

    @property
    def _named(self) -> str:
        return f"the chat template of {getattr(self.tokenizer, 'name_or_path', '') or 'this model'}"

    @property
    def _template_text(self) -> str:
        """The chat template; empty for a model without one."""
        held = self.tokenizer.chat_template
        if isinstance(held, dict) and held and "default" not in held:
            raise ModelError(
                f"{self._named}: there are several ({', '.join(sorted(held))}) and none is named default; name the one "
                "to use: save it as chat_template.jinja in the model's folder"
            )
        return (held["default"] if isinstance(held, dict) and held else held) or ""

    @cached_property
    def _takes_system(self) -> bool:
        """Whether the template renders a system message. Tries one, and prints a line if it does not."""
        probe = "reason in steps"
        try:
            taken = probe in self._apply(
                [{"role": "system", "content": probe}, {"role": "user", "content": "a question"}], True
            )
        except ModelError:
            taken = False
        if not taken:
            say(f"{self._named} takes no system message: its text is put before the first question instead")
        return taken

    # -------------------------------------------------------------------------------- properties of a template

    def _template_opens_thought(self) -> bool:
        """Whether a chat prompt ends inside a thought. Raises `ModelError` for tags that are not ours."""
        example = self.task.probe()
        asked = self._prompt_of(example) if example else _PROBE_CHAT[:1]
        if isinstance(asked, str) or not self._template_text:
            return False
        text = self._template(asked, generation=True)
        opened = bool(self._opening(text, asked[-1][1]))
        self._header = text.rpartition(asked[-1][1])[2]
        if (unknown := _UNKNOWN_THOUGHT.search(text)) and not opened:
            raise ModelError(
                f"{self._named} opens a thought with {unknown.group().strip()}: pass it as --think_open, and what "
                "closes it as --think_close"
            )
        return opened

    def _opening(self, prompt: str, question: str) -> str:
        """The opened thought at the end of a rendered chat prompt, behind the question; "" if none is open."""
        tail = prompt.rpartition(question.strip())[2]
        before, opened, inside = tail.rpartition(self.tags.think_open)
        open_still = bool(opened) and self.tags.think_close not in inside and not self._control_token(inside)
        return tail[len(before) :] if open_still else ""

    def _dated(self) -> dict[str, str]:
        return {"date": self.date} if self.reads_date else {}

    def _control_tokens(self) -> list[str]:
        """Tokens that no text may contain: special tokens, and added tokens that the template uses. Tags are text."""
        built = set[int]()
        if self._template_text:
            for chat, generation in ((_PROBE_CHAT, False), (_PROBE_CHAT[:1], True)):
                built |= set(self._encode(self._template(chat, generation)))
        tags = vars(self.tags).values()
        added = self.tokenizer.added_tokens_decoder.items()
        control = [t.content for i, t in added if t.special or i in built]
        return [token for token in control if token.strip() and token not in tags]

    def _control_token(self, text: str) -> str | None:
        """The first control token in a text, or None."""
        return next((token for token in self.special_tokens if token in text), None)

    def _encode(self, text: str) -> list[int]:
        # The template writes its special tokens itself, and a second BOS must not appear.
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _end_of_turn(self) -> int:
        """The id that ends an assistant's turn in the chat template, else the tokenizer's EOS."""
        eos = self.tokenizer.eos_token_id
        if self._template_text:
            (_, question), (_, answer) = _PROBE_CHAT
            if question not in self._template(_PROBE_CHAT[:1], generation=True):
                raise ModelError(f"{self._named} does not render the user's message; fix chat_template.jinja")
            _, found, behind = self._template(_PROBE_CHAT, generation=False).rpartition(answer)
            self._turn_end = behind if found else ""
            after = self._encode(self._turn_end.strip())
            if after and after[0] in self.tokenizer.added_tokens_decoder:
                return after[0]
        if eos is None:
            raise ConfigError("this tokenizer has neither an end-of-sequence token nor a chat template with one")
        return int(eos)

    @staticmethod
    def _join(parts: Sequence[tuple[list[int], int]]) -> Datum:
        ids = tuple(i for part, _ in parts for i in part)
        return Datum(ids, tuple(flag for part, flag in parts for _ in part))


def _source(example: Example) -> Source:
    return example.source or Source(f"example {example.id}", None)


def _refused(source: Source, what: str) -> DataError:
    return DataError(source.path, what, source.line)


DEFAULT_TASK = "gsm8k"


def task_of(cfg: PromptConfig) -> Task:
    """The task of a config: as given, else as stored in the model folder, else gsm8k; style and tags likewise.

    A stored style applies only if the model was trained on the same task.
    """
    tags = make_tags(cfg.think_open, cfg.think_close, cfg.answer_open, cfg.answer_close)
    style, stored = cfg.prompt_style, remembered(cfg.model_id)
    spec = cfg.task or (stored["task"] if stored else DEFAULT_TASK)
    if style == "auto" and stored and stored["task"] == spec:
        style, tags = stored["prompt_style"], Tags(**{key: stored[key] for key in vars(Tags())})
    known = {name: getattr(cfg, name) for name in GRADING if hasattr(cfg, name)}
    settings = {name: getattr(cfg, name) for name in TASK_SETTINGS if hasattr(cfg, name)}
    return load_task(spec, TaskOptions(style, tags, settings=settings, **known))


def remembered(model_id: str) -> dict[str, Any] | None:
    """Task, style, tags and date that a model folder stores, or None."""
    path = Path(model_id) / PROMPT_FILE
    if not path.is_file():
        return None
    stored = {"task": DEFAULT_TASK, "date": None, **read_json(path)}
    strings = isinstance(stored["task"], str) and isinstance(stored.get("prompt_style"), str)
    if not strings or stored.keys() != {"task", "date", "prompt_style", *vars(Tags())}:
        raise DataError(path, "does not say how the model is asked; pass --prompt_style")
    return stored


def date_of(cfg: PromptConfig) -> str:
    """The date for chat templates: as configured, else as stored in the model folder, else `DATE`."""
    if cfg.date:
        return cfg.date
    stored = remembered(cfg.model_id)
    return (stored and stored["date"]) or DATE


def parse_date(text: str) -> datetime:
    """A date, or a date and a time of day. Raises `ConfigError` for anything else."""
    try:
        return datetime.fromisoformat(text)
    except (TypeError, ValueError):
        raise ConfigError(
            f"--date {text!r}: must be a date as in {DATE}, or with a time as in {DATE}T12:00:00"
        ) from None


def check_lengths(prompts: Sequence[Prompt], context: int, source: str) -> None:
    """Raise `DataError` if a prompt fills the model's context."""
    longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
    length = len(longest.token_ids)
    if length >= context:
        raise DataError(
            source,
            f"{longest.example.id}: a prompt of {length} tokens does not fit into the model's context "
            f"of {context}; leave this one out, or take another model",
        )
