"""The math task: hand-derived verdicts, random pairs that are known by construction, and hostile answers."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from fractions import Fraction

import pytest

from grpo_gsm8k.tasks.math import extract, gold_of, grade
from grpo_gsm8k.tasks.math import worker as worker_module
from grpo_gsm8k.tasks.math.worker import Worker

from .math_table import ANSWERS, RESPONSES


@pytest.fixture(autouse=True)
def no_math_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exact layers decide alone here; the worker has tests of its own."""
    monkeypatch.setattr(worker_module.WORKER, "ask", lambda gold, answer: None)


@pytest.mark.parametrize("gold, right, wrong", ANSWERS, ids=[str(number) for number in range(len(ANSWERS))])
def test_the_table_of_answers(gold: str, right: list[str], wrong: list[str]) -> None:
    for mode in ("flexible", "strict"):
        refused = [answer for answer in right if not grade(rf"So $\boxed{{{answer}}}$.", gold, mode)]
        accepted = [answer for answer in wrong if grade(rf"So $\boxed{{{answer}}}$.", gold, mode)]
        assert (refused, accepted) == ([], [])


def test_the_table_of_responses() -> None:
    verdicts = [(g, r, grade(r, g), grade(r, g, "strict")) for g, r, _, _ in RESPONSES]
    assert [v for v, case in zip(verdicts, RESPONSES, strict=True) if v != case] == []


def test_a_gold_may_be_a_whole_solution() -> None:
    solution = r"First \boxed{3} of them, then two more, so there are $\boxed{\frac{10}{2}}$."
    assert gold_of(solution) == r"\frac{10}{2}"
    assert grade(r"\boxed{5}", solution)
    assert not grade(r"\boxed{3}", solution)


def test_the_extracted_answer_is_the_text_as_written() -> None:
    assert extract(r"So $\boxed{\dfrac{1}{2}}$") == r"\dfrac{1}{2}"
    assert extract("no idea", "strict") is None
    assert extract(r"<think>\boxed{1}</think>") is None


def test_what_is_no_text_is_wrong_and_an_unknown_mode_is_refused() -> None:
    assert not grade(None, "5")  # type: ignore[arg-type]
    assert not grade("5", None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mode must be"):
        grade("5", "5", "loose")  # type: ignore[arg-type]


# -- pairs that are right or wrong by construction


def _frac(value: Fraction) -> str:
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _fraction_forms(value: Fraction, rng: random.Random) -> Iterator[str]:
    p, q = value.numerator, value.denominator
    k = rng.choice([2, 3, 7, -1, -4])
    yield rf"\frac{{{p * k}}}{{{q * k}}}"
    yield f"{p}/{q}"
    yield rf"{p} \div {q}" if p > 0 else rf"-\dfrac{{{-p}}}{{{q}}}"
    if abs(p) > q > 1:
        whole, rest = divmod(abs(p), q)
        yield f"{'-' if p < 0 else ''}{whole}\\frac{{{rest}}}{{{q}}}"
    shift = Fraction(rng.randint(1, 9), rng.randint(1, 9))
    yield f"{_frac(value - shift)}+{_frac(shift)}"


def _decimal(value: Fraction) -> str | None:
    for places in range(12):
        scaled = value * 10**places
        if scaled.denominator == 1:
            digits = str(abs(scaled.numerator)).rjust(places + 1, "0")
            point = f"{digits[: len(digits) - places]}.{digits[len(digits) - places :]}" if places else digits
            return ("-" if value < 0 else "") + point
    return None


def _rational(rng: random.Random) -> tuple[str, list[str], list[str]]:
    value = Fraction(rng.randint(-60, 60) or 7, rng.randint(2, 40))
    gold = _frac(value)
    near = [-value, value + Fraction(1, 10**6), value + 1, 1 / value if abs(value) != 1 else value * 2]
    rounded = f"{float(value):.3f}"
    right = list(_fraction_forms(value, rng))
    wrong = [f"{v.numerator}/{v.denominator}" for v in near]
    exact = _decimal(value)
    if exact:
        right.append(exact)
    elif Fraction(rounded) != value:
        wrong.append(rounded)
    return gold, right, wrong


def _radical(rng: random.Random) -> tuple[str, list[str], list[str]]:
    a, b, n = rng.randint(1, 9), rng.randint(1, 9), rng.choice([2, 3, 5, 6, 7, 10, 11])
    square = a * a + b * b * n
    gold = rf"{a}+{b}\sqrt{{{n}}}"
    right = [
        rf"{b}\sqrt{{{n}}}+{a}",
        rf"{a}+\sqrt{{{b * b * n}}}",
        rf"\sqrt{{{square}+{2 * a * b}\sqrt{{{n}}}}}",
        rf"\frac{{{2 * a}+{2 * b}\sqrt{n if n < 10 else '{' + str(n) + '}'}}}{{2}}",
    ]
    norm = a * a - b * b * n
    if norm:
        right.append(rf"\frac{{{norm}}}{{{a}-{b}\sqrt{{{n}}}}}")
    wrong = [
        rf"{a}-{b}\sqrt{{{n}}}",
        rf"{a}+{b + 1}\sqrt{{{n}}}",
        rf"{a}+{b}\sqrt{{{n + 1}}}",
        f"{a + b * n**0.5:.12f}",
        rf"\sqrt{{{square + 1}+{2 * a * b}\sqrt{{{n}}}}}",
    ]
    return gold, right, wrong


def _polynomial(rng: random.Random) -> tuple[str, list[str], list[str]]:
    r, s = rng.randint(-9, 9) or 1, rng.randint(-9, 9) or 2
    b, c = -(r + s), r * s

    def signed(value: int, rest: str = "") -> str:
        return f"{'+' if value >= 0 else '-'}{abs(value)}{rest}"

    gold = f"x^2{signed(b, 'x')}{signed(c)}"
    right = [
        f"(x{signed(-r)})(x{signed(-s)})",
        f"{c}{signed(b, 'x')}+x^2",
        rf"\frac{{2x^2{signed(2 * b, 'x')}{signed(2 * c)}}}{{2}}",
    ]
    wrong = [
        f"x^2{signed(b, 'x')}{signed(c + 1)}",
        f"x^2{signed(b + 1, 'x')}{signed(c)}",
        f"(x{signed(-r)})(x{signed(-s + 1)})",
    ]
    return gold, right, wrong


def _interval(rng: random.Random) -> tuple[str, list[str], list[str]]:
    low = rng.randint(-20, 10)
    high = low + rng.randint(1, 20)
    opener, closer = rng.choice("(["), rng.choice(")]")
    below, above = ("<" if opener == "(" else r"\le"), ("<" if closer == ")" else r"\le")
    gold = f"{opener}{low},{high}{closer}"
    right = [
        rf"{low} {below} x {above} {high}",
        rf"x\in\left{opener}{low}, {high}.0\right{closer}",
        f"{opener}{2 * low}/2,{high}{closer}",
    ]
    other = {"(": "[", "[": "(", ")": "]", "]": ")"}
    wrong = [
        f"{other[opener]}{low},{high}{closer}",
        f"{opener}{low},{high}{other[closer]}",
        f"{opener}{low},{high + 1}{closer}",
        rf"\{{{low},{high}\}}",
    ]
    return gold, right, wrong


def _roots(rng: random.Random) -> tuple[str, list[str], list[str]]:
    values = rng.sample(range(-30, 30), rng.randint(2, 5))
    shuffled = rng.sample(values, len(values))
    gold = ",".join(map(str, values))
    right = [
        ", ".join(map(str, shuffled)),
        rf"\{{{','.join(map(str, shuffled))}\}}",
        r" \text{ or } ".join(f"x={v}" for v in shuffled),
    ]
    wrong = [
        ", ".join(map(str, shuffled[1:])),
        ", ".join(map(str, [*shuffled, 99])),
        ", ".join(map(str, [shuffled[0] + 100, *shuffled[1:]])),
    ]
    return gold, right, wrong


def _tuple(rng: random.Random) -> tuple[str, list[str], list[str]]:
    values = rng.sample(range(-30, 30), rng.randint(2, 4))
    shown = ",".join(map(str, values))
    right = [rf"\left({shown.replace(',', ', ')}\right)", "(" + ",".join(f"{2 * v}/2" for v in values) + ")"]
    wrong = [
        "(" + ",".join(map(str, values[::-1])) + ")",
        rf"\{{{shown}\}}",
        f"({shown},0)",
        "(" + ",".join(str(-v or 5) for v in values) + ")",
    ]
    return f"({shown})", right, wrong


def _matrix(rng: random.Random) -> tuple[str, list[str], list[str]]:
    rows = [[rng.randint(-9, 9) for _ in range(2)] for _ in range(2)]
    if rows[0][1] == rows[1][0]:
        rows[0][1] += 1

    def shown(entries: list[list[int]], kind: str = "pmatrix") -> str:
        return rf"\begin{{{kind}}}" + r"\\".join("&".join(map(str, row)) for row in entries) + rf"\end{{{kind}}}"

    doubled = [[2 * entry for entry in row] for row in rows]
    transposed = [list(column) for column in zip(*rows, strict=True)]
    changed = [rows[0], [rows[1][0], rows[1][1] + 1]]
    return (
        shown(rows),
        [shown(rows, "bmatrix"), rf"\frac12{shown(doubled)}"],
        [shown(transposed), shown(changed), shown(doubled)],
    )


def _line(rng: random.Random) -> tuple[str, list[str], list[str]]:
    m, b = rng.randint(2, 9), rng.randint(1, 9)
    gold = f"y={m}x+{b}"
    right = [f"{m}x-y+{b}=0", f"2y={2 * m}x+{2 * b}", f"y-{b}={m}x", f"{m}x+{b}", f"x=\\frac{{y-{b}}}{{{m}}}"]
    return gold, right, [f"y={m}x-{b}", f"y={m + 1}x+{b}", f"x={m}y+{b}", f"{m}x+y+{b}=0"]


def _base(rng: random.Random) -> tuple[str, list[str], list[str]]:
    base = rng.randint(3, 9)
    digits = str(rng.randint(1, base - 1)) + "".join(str(rng.randint(0, base - 1)) for _ in range(3))
    return (
        f"{digits}_{base}",
        [f"{digits}_{{{base}}}", str(int(digits, base))],
        [f"{digits}_{{{base + 1}}}", str(int(digits, base) + 1)],
    )


KINDS: list[Callable[[random.Random], tuple[str, list[str], list[str]]]] = [
    _rational, _radical, _polynomial, _interval, _roots, _tuple, _matrix, _line, _base,
]  # fmt: skip


def _failures(seed: int, count: int) -> list[tuple[str, str, bool]]:
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        for kind in KINDS:
            gold, right, wrong = kind(rng)
            for answer, verdict in [(a, True) for a in right] + [(a, False) for a in wrong]:
                if grade(rf"\boxed{{{answer}}}", gold) is not verdict:
                    found.append((gold, answer, verdict))
    return found


def test_random_pairs_that_are_right_or_wrong_by_construction() -> None:
    assert _failures(seed=0, count=12) == []


@pytest.mark.slow
def test_many_random_pairs() -> None:
    assert _failures(seed=1, count=400) == []


# -- hostility

MEGABYTE = 10**6
RUNS = (
    "9", "(", "{", "\\", r"\boxed{", r"\frac{", "9^", "<think>", "<answer>", "$", "\n", " ", "the answer is ",
    "answer: 5\n", "#", "#### 5\n", "*", "1,", "-", r"\sqrt{", "Wait, ", "\nQuestion: ", "\0", "½", "²", r"\pm",
    r"\left(", r"\begin{pmatrix}", "x ", "=", "|", r"\boxed{5} ", "<|im_end|>", "5 or ", r"\text{", "A. ",
    r"not \boxed{5} ", r"\boxed{}", "<think></think>", r"\begin{align}", "0.", r"\overline{", "!", "%", r"^\circ",
    "_", "\\\\", "&", ";", ":", r"\{", "[", "]",
)  # fmt: skip
NUMBERS = (
    "9^{9^{9^9}}", "9**9**9**9", "10^{10^{10}}+1", "(((9!)!)!)!", "1000000!", r"\binom{10^9}{5\cdot10^8}",
    r"\sqrt[10^9]{2}", r"\sin(10^{100000})", r"\exp(\exp(\exp(100)))", "e^{e^{e^{e^e}}}", "(x+1)^{10^6}",
    "(x+y+z+w)^{1000}", "1" + "+1" * 700, "+".join(rf"\sqrt{{{k}}}" for k in range(2, 60)),
    ",".join(rf"\sqrt{{{k}}}" for k in range(1, 64)), "x" * 300, r"\frac{1}{" * 30 + "2" + "}" * 30,
    r"\sqrt{2+" * 25 + "2" + "}" * 25, "(" * 39 + "1" + ")" * 39, "1e999999", "9" * 4000,
    r"\lfloor 10^{300}\pi\rfloor", "(1+10^{-9})^{10^9}", "x^{x^{x^{x^x}}}", r"\pm1\pm2\pm3\pm4\pm5\pm6",
    r"\frac{1}{0}", "0^{-1}", r"\ln 0", r"\tan(\frac{\pi}{2})", r"\sqrt[64]{2}+\sqrt[63]{3}+\sqrt[62]{5}",
)  # fmt: skip


def _hostile() -> Iterator[tuple[str, str]]:
    for run in RUNS:
        text = run * (MEGABYTE // len(run))
        for response in (
            text,
            rf"\boxed{{{text}}}",
            text + r"\boxed{5}",
            r"\boxed{5}" + text,
            f"<answer>{text}</answer>",
        ):
            yield response, "5"
        yield r"\boxed{5}", text
    for number in NUMBERS:
        for other in ("5", "9^{9^{9^9}}", r"\sqrt2", r"\pi", "x+1", "(1,2)", r"\{1,2\}", "[0,1]", number):
            yield rf"\boxed{{{number}}}", other
            yield rf"\boxed{{{other}}}", number


def test_towers_of_powers_and_long_texts_are_answered() -> None:
    for number in NUMBERS[:6]:
        assert grade(rf"\boxed{{{number}}}", number)
        assert not grade(rf"\boxed{{{number}}}", "5")
    for run in ("\\boxed{", "(", "9", "<think>"):
        assert not grade(run * (MEGABYTE // len(run)), "5")


@pytest.mark.slow
def test_every_hostile_answer_takes_less_than_a_second() -> None:
    worst = (0.0, "")
    for response, gold in _hostile():
        start = time.process_time()
        assert isinstance(grade(response, gold), bool)
        worst = max(worst, (time.process_time() - start, response[:40]))
    assert worst[0] < 1.0, worst


def test_nothing_in_a_response_is_executed(tmp_path: object) -> None:
    mark = f"{tmp_path}/executed"
    for code in (f"__import__('os').system('touch {mark}')", f"open('{mark}','w')", "exit()", "().__class__.__bases__"):
        for response in (code, rf"\boxed{{{code}}}", f"<answer>{code}</answer>"):
            assert not grade(response, "5")
            assert not grade(r"\boxed{5}", code)
    assert not __import__("pathlib").Path(mark).exists()


def test_threads_may_grade_at_once() -> None:
    failures: list[int] = []

    def work(seed: int) -> None:
        failures.append(len(_failures(seed, 2)))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [0, 0, 0, 0]


# -- Math-Verify in its process


class _FakeWorker(Worker):
    """A worker whose child is a few lines of Python, to test the protocol without SymPy."""

    child = ""

    def _command(self) -> list[str]:
        return [sys.executable, "-c", self.child]


ECHO = """
import json, sys, time
print("ready", flush=True)
for line in sys.stdin:
    gold, answer = json.loads(line)
    if answer == "sleep": time.sleep(60)
    if answer == "die": sys.exit(1)
    print("yes" if gold == answer else "no", flush=True)
"""


def test_a_child_that_hangs_or_dies_is_replaced() -> None:
    worker = _FakeWorker()
    worker.child = ECHO
    try:
        assert worker.warm_up(20)
        assert worker.ask("1", "1", 10) is True
        assert worker.ask("1", "2", 10) is False
        start = time.monotonic()
        assert worker.ask("1", "sleep", 0.2) is None
        assert time.monotonic() - start < 2
        assert worker.warm_up(20)
        assert worker.ask("1", "1", 10) is True
        assert worker.ask("1", "die", 10) is None
        assert worker.warm_up(20)
        assert worker.ask("3", "3", 10) is True
    finally:
        worker.close()


def test_only_mathematics_that_the_parser_lacks_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(worker_module.WORKER, "ask", lambda gold, answer: asked.append(answer))
    for answer in (
        r"\int_0^1 x\,dx",
        r"\sum_{k=1}^{3} k",
        "5",
        "12+",
        r"\text{no}",
        "9^{9^{9^9}}",
        "((",
        r"2\sqrt[3]{}",
    ):
        assert not grade(rf"\boxed{{{answer}}}", "17")
    assert asked == [r"\int_0^1 x\,dx", r"\sum_{k=1}^{3} k"]


@pytest.mark.slow
def test_math_verify_decides_what_the_parser_lacks() -> None:
    worker = Worker()
    try:
        assert worker.warm_up(120)
        assert worker.ask(r"\frac12", r"\int_0^1 x dx", 20) is True
        assert worker.ask(r"\frac13", r"\int_0^1 x dx", 20) is False
        start = time.monotonic()
        worker.ask("5", r"\sum_{k=1}^{10^{10}} k!", 0.5)
        assert time.monotonic() - start < 1
    finally:
        worker.close()


def test_the_grader_imports_neither_torch_nor_sympy() -> None:
    code = (
        "import sys; from grpo_gsm8k.tasks.math import grade; "
        "import grpo_gsm8k.tasks.countdown, grpo_gsm8k.tasks.sort_words, grpo_gsm8k.tasks.calculator; "
        r"assert grade(r'\boxed{\sqrt8}', r'2\sqrt2'); assert not {'torch', 'sympy', 'math_verify'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
