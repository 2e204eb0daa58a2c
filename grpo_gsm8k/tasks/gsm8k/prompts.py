"""How a problem is asked, how a solution is written, and the one place where ids and mask are born.

A `Style` is a few lines of text; to add one, add an entry to `STYLES`. A `Renderer` binds a style to a
tokenizer. It returns token ids and response mask together, so that nothing downstream has to guess from
text or from padding which tokens are the response's.

A trained row is the prompt's ids as a sampler sees them, then the ids that it would have to draw for the chat to read
as the model's own chat template renders it. Where the prompt is not the beginning of that chat, there is no such row,
and the example is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from grpo_gsm8k.config import PromptConfig
from grpo_gsm8k.datatypes import Problem, Prompt, Rendered, Source, TokenRow
from grpo_gsm8k.errors import ConfigError, DataError, ModelError
from grpo_gsm8k.runs.files import read_json, write_json
from grpo_gsm8k.runs.progress import talk
from grpo_gsm8k.tasks.gsm8k.grading import Tags, after_opened_thought, extract, parse_number

Message = tuple[str, str]  # (role, content)
PROMPT_FILE = "prompt.json"
SHOT_BREAK = "\n\n\n"  # between worked examples in plain text; a completion that writes it begins another one
DATE = "2024-07-26"
"""The date that chat templates write unless another is given: a constant, so that ids are the same on every day.
Llama 3's own templates write this one where nobody tells them the date."""
PROBE = "3.14 + 1,234 = $56  costs 7%\n\n\tIt's \\boxed{72}. Größe ½ 数"  # what tokenizers split in different ways


@dataclass(frozen=True)
class Form:
    """Whether a response has the form that was asked for, whatever its answer; called with the response.

    Attributes:
        check: the form itself.
        opens_thought: the prompt opens a thought. Until the response closes it, there is no answer and no form.
    """

    check: Callable[[str], bool]
    tags: Tags
    opens_thought: bool = False

    def __call__(self, response: str) -> bool:
        if self.opens_thought and after_opened_thought(response, self.tags) is None:
            return False
        return self.check(response)


@dataclass(frozen=True)
class Style:
    """One way to ask and to answer.

    Attributes:
        ask: question → chat messages, or → plain text for a model without chat turns.
        reference: problem → the response that a teacher would write, from GSM8K's reference solution.
        format_ok: response → whether it has the form that was asked for.
        stop: strings that end a completion.
    """

    ask: Callable[[str], list[Message] | str]
    reference: Callable[[Problem], str]
    format_ok: Form
    stop: tuple[str, ...] = ()

    @property
    def opens_thought(self) -> bool:
        """Whether every prompt opens a thought, so that a completion starts inside it."""
        return self.format_ok.opens_thought


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
        format_ok=Form(_gsm8k_format_ok, tags),
    )


def _qwen_boxed(tags: Tags) -> Style:
    system = "Please reason step by step, and put your final answer within \\boxed{}."
    return Style(
        ask=lambda question: [("system", system), ("user", question)],
        reference=lambda p: f"{working(p)}\n\nThe final answer is $\\boxed{{{p.gold}}}$.".strip(),
        format_ok=Form(lambda response: "\\boxed{" in response and extract(response, "strict") is not None, tags),
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

    form_ok = Form(format_ok, tags, opens_thought=True)
    return Style(ask, reference, form_ok, stop=(tags.answer_close,) if answered and tags.answer_close else ())


STYLES: dict[str, Callable[[Tags], Style]] = {"gsm8k": _gsm8k, "qwen_boxed": _qwen_boxed, "r1_zero": _r1_zero}


def make_tags(think_open: str, think_close: str, answer_open: str, answer_close: str) -> Tags:
    """Tags from configured strings; empty answer tags mean think-only. Raises `ConfigError` for half a pair."""
    if not think_open or not think_close or bool(answer_open) != bool(answer_close):
        raise ConfigError("tags come in pairs: think_open with think_close, answer_open with answer_close")
    given = [tag for tag in (think_open, think_close, answer_open, answer_close) if tag]
    if len(set(given)) < len(given):
        raise ConfigError(f"tags must differ from each other: {', '.join(given)}")
    return Tags(think_open, think_close, answer_open or None, answer_close or None)


_UNKNOWN_THOUGHT = re.compile(
    r"(?:<[^<>/\s]*(?:think|thought|reason)[^<>/\s]*>|\[(?:THINK|THOUGHT|REASON\w*)\])\s*$", re.I
)
_READS_DATE = re.compile(r"\b(?:strftime_now|date_string)\b")
_PROBE_CHAT = (("user", "a question"), ("assistant", "an answer"))


class Renderer:
    """A style bound to a tokenizer: problems and chats in, token ids with their mask out."""

    def __init__(
        self,
        tokenizer: Any,
        style: str = "gsm8k",
        tags: Tags | None = None,
        shots: Sequence[Problem] = (),
        date: str = DATE,
    ) -> None:
        """`tokenizer` is a transformers tokenizer; `tags` are those of the r1_zero style and of grading.

        Args:
            shots: problems that every prompt shows first, each with its reference solution.
            date: what a chat template writes that asks for the date: the same for a run and all that goes on from it.

        Raises:
            ModelError: the chat template is broken, or renders nothing that could be used.
        """
        self.tokenizer, self.name, self.shots = tokenizer, style, tuple(shots)
        self.tags, self.date = tags or Tags(), date
        self._now = parse_date(date)
        added = tokenizer.added_tokens_decoder
        self._special_ids = {i for i, t in added.items() if t.special}
        self._special_tags = {i for i in self._special_ids if added[i].content in vars(self.tags).values()}
        self.style = STYLES[style](self.tags)
        self._turn_end, self._header = "", ""  # what a template writes behind an answer, and before one
        self.end_id = self._end_of_turn()
        self._ends_turns = self.end_id in self._encode(self._turn_end)
        self.special_tokens = self._control_tokens()
        self.pad_id: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.end_id
        if self._template_opens_thought():
            self.style = replace(self.style, format_ok=replace(self.style.format_ok, opens_thought=True))

    @classmethod
    def of(cls, cfg: PromptConfig, tokenizer: Any, shots: Sequence[Problem] = ()) -> Renderer:
        """The renderer that a config asks for: style, tags and date as given, or as the model folder remembers them."""
        return cls(tokenizer, *how_to_ask(cfg), shots, date_of(cfg))

    @property
    def opens_thought(self) -> bool:
        """Whether every prompt opens a thought, so that a completion starts inside it."""
        return self.style.opens_thought

    @property
    def reads_date(self) -> bool:
        """Whether the chat template asks for the date."""
        return bool(_READS_DATE.search(self._template_text))

    def save_pretrained(self, folder: Path) -> None:
        """The tokenizer, and how this model was asked, so that it is asked the same way next time."""
        self.tokenizer.save_pretrained(folder)
        write_json(folder / PROMPT_FILE, {"prompt_style": self.name, **vars(self.tags), **self._dated()})

    def made_with(self) -> dict[str, str | None]:
        """What rendered ids depend on besides the text: style, tags, date, and a hash of tokenizer and chat template.

        Where the text is at hand (prepared prompts), this only explains a difference, and the ids decide whether there
        is one. Shards of token ids are held to it.
        """
        ends = [self.end_id, self.tokenizer.bos_token_id, self._encode(PROBE)]
        parts = [sorted(self.tokenizer.get_vocab().items()), self.tokenizer.chat_template, ends]
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        return {"prompt_style": self.name, **vars(self.tags), "tokenizer": digest[:16], **self._dated()}

    def check(self, examples: bool = False) -> str:
        """Render a prompt, and a reference solution where `examples` are trained; say what was found, in one line.

        Raises:
            ModelError: the template is of no use for this, for the reason given.
        """
        problem = Problem("check", "Tom has 2 eggs and buys 3. How many?", "2+3=<<2+3=5>>5\n#### 5", "5")
        prompt = self.render(problem)
        if self.render(problem) != prompt:
            raise ModelError(f"{self._named}: renders the same prompt in two ways; no run could be repeated")
        found = [f"a prompt of {len(prompt.token_ids)} tokens", f"turns end with {self.spell([self.end_id])}"]
        found += ["it opens a thought"] if self.opens_thought else []
        found += [f"it writes the date, {self.date}"] if self.reads_date else []
        if examples:
            try:
                row = self.example(problem)
            except DataError as fault:
                raise ModelError(f"no reference solution can be trained: {fault.what}") from None
            assert row.token_ids[: len(prompt.token_ids)] == prompt.token_ids and row.token_ids[-1] == self.end_id
            found.append(f"a reference solution of {sum(row.mask)} tokens")
        return ", ".join(found)

    def prompt(self, problem: Problem) -> Prompt:
        """What the model sees before it answers.

        Raises:
            DataError: the problem comes with a stored prompt that is not, id for id, what this renderer makes;
                or its text holds a control token.
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
        """The prompt of a problem, whatever is stored with it. Raises `DataError` for a control token in its text."""
        for shown in (problem, *self.shots):
            if found := self._control_token(shown.question):
                raise _refused(
                    _source(shown),
                    f"the question holds {found}, a special token of this model: a prompt that was rendered already "
                    "would be rendered twice; give the bare question, or a set that `grpo-gsm8k prep-eval` made",
                )
            if found := self._control_token(shown.answer):
                what = f"the answer holds {found}, a special token of this model, which is no text; take it out"
                raise _refused(_source(shown), what)
        source, asked = _source(problem), self._ask(problem.question)
        if isinstance(asked, str) or not self._template_text:
            return Prompt(problem, tuple(self._plain_ids(self._plain(asked))))
        text = self._row_template(asked, True, source)
        if not text.endswith(self._header) and self._ends_open(text, asked[-1][1]) != self.opens_thought:
            raise _refused(
                source,
                f"{self._named} opens a thought for some questions and not for others, so that answers could not be "
                "told from thoughts; take this one out, or pass another --prompt_style",
            )
        return Prompt(problem, tuple(self._encode(text)))

    def example(self, problem: Problem) -> TokenRow:
        """A problem with its reference solution; mask 1 on the solution and on the end-of-turn id."""
        prompt = list(self.prompt(problem).token_ids)
        asked, answer = self._ask(problem.question), self.style.reference(problem)
        if isinstance(asked, str) or not self._template_text:
            response = self._continued(self._plain(asked), prompt, answer, _source(problem))
            return self._join([(prompt, 0), (response, 1)])
        return self._trained([*asked, ("assistant", answer)], [len(asked)], _source(problem))

    def chat(
        self, messages: Sequence[Message], train_on: str = "last", raw: bool = False, source: Source | None = None
    ) -> TokenRow:
        """A conversation that ends with the assistant.

        Args:
            messages: (role, content) pairs.
            train_on: "last" masks in the last assistant message; "all" every one.
            raw: the first of two messages is the prompt as the model reads it, without a chat's turns.
            source: where it was read, for the error.

        Raises:
            ConfigError: "all" is asked of a chat template that rewrites earlier turns.
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
        """Text for graders and people; special tokens left out, but for the tags, which a verdict needs."""
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

    # ------------------------------------------------------------------------------------------ plain text

    def _plain_ids(self, text: str) -> list[int]:
        bos = self.tokenizer.bos_token_id
        return ([] if bos is None else [bos]) + self._encode(text)

    def _continued(self, text: str, prompt: list[int], answer: str, source: Source) -> list[int]:
        """The ids of an answer behind a plain prompt, as a sampler would draw them, and the end of the turn.

        They are those of the whole text where the prompt's ids are its beginning. Else a token of the whole text would
        run over the prompt's end; then they are the answer's ids behind a short text that no token runs over. As a text
        of its own the answer would begin with the blank that SentencePiece puts before every text.
        """
        whole = self._plain_ids(text + answer)
        if whole[: len(prompt)] == prompt:
            return [*whole[len(prompt) :], self.end_id]
        for anchor in ("\n", ".", "a", "▁"):
            head, both = self._encode(anchor), self._encode(anchor + answer)
            if both[: len(head)] == head:
                return [*both[len(head) :], self.end_id]
        raise _refused(source, "the tokenizer joins the response's beginning with whatever stands before it")

    # ----------------------------------------------------------------------------------------------- chats

    def _trained(self, messages: Sequence[Message], said: Sequence[int], source: Source) -> TokenRow:
        """A rendered conversation, with the assistant's messages at the indices `said` masked in."""
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
        return TokenRow(tuple(ids), tuple(mask))

    def _turn(self, messages: Sequence[Message], prompt: str, source: Source) -> str:
        """The text of a conversation whose last message is trained, as its template renders it.

        A message that brings its own thought has it once: as the template renders it, else as the template renders a
        message with its thought apart, else the prompt's own opening with the message behind it.
        """
        content = messages[-1][1]
        whole = self._row_template(messages, False, source)
        if not self._ends_turns:  # no token ends a turn here, so the tokenizer's own end does
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
        """Why no row can be made of a conversation that does not begin with its prompt."""
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
            f"{self._named}: the prompt{opened} is not how the rendered conversation begins: {prompt[at:][:30]!r} "
            f"stands in the one, {whole[at:][:30]!r} in the other; this cannot be fine-tuned on"
            + ("; give pairs with thoughts" if self.opens_thought else "")
        )

    def _row_template(
        self, messages: Sequence[Message], generation: bool, source: Source, last: dict[str, str] | None = None
    ) -> str:
        """As `_template`, with a fault blamed on the row."""
        try:
            return self._template(messages, generation, last)
        except ModelError as fault:
            raise _refused(source, str(fault)) from None

    def _template(self, messages: Sequence[Message], generation: bool, last: dict[str, str] | None = None) -> str:
        """Messages as the chat template renders them; one without a system role finds it before the first question.

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
        """What jinja makes of a chat. Raises `ModelError` for whatever a template can do wrong."""
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
                f"{self._named} fails on a chat of {roles}: {said}; mend chat_template.jinja in the model's folder"
            ) from None
        return text

    @property
    def _named(self) -> str:
        return f"the chat template of {getattr(self.tokenizer, 'name_or_path', '') or 'this model'}"

    @property
    def _template_text(self) -> str:
        """The template that chats are rendered with; empty for a model without one."""
        held = self.tokenizer.chat_template
        if isinstance(held, dict) and held and "default" not in held:
            raise ModelError(
                f"{self._named}: there are several ({', '.join(sorted(held))}) and none is named default; name the one "
                "to use: save it as chat_template.jinja in the model's folder"
            )
        return (held["default"] if isinstance(held, dict) and held else held) or ""

    @cached_property
    def _takes_system(self) -> bool:
        """Whether the template renders a system message; found out with one, and said once where it does not."""
        probe = "reason in steps"
        try:
            taken = probe in self._apply(
                [{"role": "system", "content": probe}, {"role": "user", "content": "a question"}], True
            )
        except ModelError:
            taken = False
        if not taken:
            talk(f"{self._named} takes no system message: its text stands before the first question instead")
        return taken

    # -------------------------------------------------------------------------------- what a template is like

    def _template_opens_thought(self) -> bool:
        """Whether a prompt of this style ends inside a thought. Raises `ModelError` for tags that are not ours."""
        asked = self.style.ask("a question")
        if isinstance(asked, str) or not self._template_text:
            return self.opens_thought
        text = self._template(asked, generation=True)
        opened = self._ends_open(text, asked[-1][1])
        self._header = text.rpartition(asked[-1][1])[2]
        if (unknown := _UNKNOWN_THOUGHT.search(text)) and not opened:
            raise ModelError(
                f"{self._named} opens a thought with {unknown.group().strip()}: pass it as --think_open, and what "
                "closes it as --think_close"
            )
        return opened

    def _ends_open(self, prompt: str, question: str) -> bool:
        """Whether a rendered chat prompt ends inside a thought: opened behind the question, in the assistant's turn."""
        tail = prompt.rpartition(question.strip())[2]
        _, opened, inside = tail.rpartition(self.tags.think_open)
        return bool(opened) and self.tags.think_close not in inside and not self._control_token(inside)

    def _dated(self) -> dict[str, str]:
        return {"date": self.date} if self.reads_date else {}

    def _control_tokens(self) -> list[str]:
        """What no text may hold: special tokens, and added tokens that the template builds turns of. Tags are text."""
        built = set[int]()
        if self._template_text:
            for chat, generation in ((_PROBE_CHAT, False), (_PROBE_CHAT[:1], True)):
                built |= set(self._encode(self._template(chat, generation)))
        tags = vars(self.tags).values()
        added = self.tokenizer.added_tokens_decoder.items()
        control = [t.content for i, t in added if t.special or i in built]
        return [token for token in control if token.strip() and token not in tags]

    def _control_token(self, text: str) -> str | None:
        """The first control token that stands in a text."""
        return next((token for token in self.special_tokens if token in text), None)

    def _encode(self, text: str) -> list[int]:
        # A template spells its special tokens out, and a second BOS must never appear.
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _end_of_turn(self) -> int:
        """The id that follows an assistant's words: read off the chat template, else the tokenizer's EOS."""
        eos = self.tokenizer.eos_token_id
        if self._template_text:
            (_, question), (_, answer) = _PROBE_CHAT
            if question not in self._template(_PROBE_CHAT[:1], generation=True):
                raise ModelError(f"{self._named} does not render what the user asks; mend chat_template.jinja")
            _, found, behind = self._template(_PROBE_CHAT, generation=False).rpartition(answer)
            self._turn_end = behind if found else ""
            after = self._encode(self._turn_end.strip())
            if after and after[0] in self.tokenizer.added_tokens_decoder:
                return after[0]
        if eos is None:
            raise ConfigError("this tokenizer has neither an end-of-sequence token nor a chat template with one")
        return int(eos)

    @staticmethod
    def _join(parts: Sequence[tuple[list[int], int]]) -> TokenRow:
        ids = tuple(i for part, _ in parts for i in part)
        return TokenRow(ids, tuple(flag for part, flag in parts for _ in part))


def _source(problem: Problem) -> Source:
    return problem.source or Source(f"problem {problem.id}", None)


def _refused(source: Source, what: str) -> DataError:
    return DataError(source.path, what, source.line)


def how_to_ask(cfg: PromptConfig) -> tuple[str, Tags]:
    """Prompt style and tags: as configured, or (auto) as the model folder remembers, else qwen_boxed."""
    tags = make_tags(cfg.think_open, cfg.think_close, cfg.answer_open, cfg.answer_close)
    if cfg.prompt_style != "auto":
        return cfg.prompt_style, tags
    return remembered(cfg.model_id) or ("qwen_boxed", tags)


def remembered(model_id: str) -> tuple[str, Tags] | None:
    """Style and tags that a model folder was trained with; None if it does not say."""
    stored = _remembered(model_id)
    return stored and stored[:2]


def date_of(cfg: PromptConfig) -> str:
    """The date that chat templates write: as configured, or as the model folder remembers, else `DATE`."""
    if cfg.date:
        return cfg.date
    stored = _remembered(cfg.model_id)
    return (stored and stored[2]) or DATE


def _remembered(model_id: str) -> tuple[str, Tags, str | None] | None:
    path = Path(model_id) / PROMPT_FILE
    if not path.is_file():
        return None
    stored = read_json(path)
    style, date = stored.pop("prompt_style", None), stored.pop("date", None)
    if style not in STYLES or stored.keys() != vars(Tags()).keys():
        raise DataError(path, "does not say how the model is asked; pass --prompt_style")
    return style, Tags(**stored), date


def parse_date(text: str) -> datetime:
    """A date, or a date and a time of day. Raises `ConfigError` for anything else."""
    try:
        return datetime.fromisoformat(text)
    except (TypeError, ValueError):
        raise ConfigError(
            f"--date {text!r}: must be a date as in {DATE}, or with a time as in {DATE}T12:00:00"
        ) from None


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
