"""Numbers in words: what every sentence and table of the report writes them with."""

from __future__ import annotations

STAGES = {"base": "Base", "sft": "SFT", "ei": "EI", "grpo": "GRPO"}
NAMES = {**STAGES, "distill": "Distillation"}  # of training runs, too, that are no stage of a pipeline
LONG_NAMES = {
    "grpo": "GRPO",
    "sft": "Supervised fine-tuning",
    "ei": "Expert iteration",
    "distill": "On-policy distillation",
}
LARGEST = 1e100


def number(value: object, form: str = "{:.4g}") -> str:
    """A finite number as text, else ''."""
    ok = isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST < value < LARGEST
    return form.format(value).replace("e-0", "e-").replace("-", "−") if ok else ""


def percent(share: object) -> str:
    """0.123 -> '12.3 %', with a space that does not break."""
    return number(100 * share, "{:.1f}\u00a0%") or "–" if isinstance(share, int | float) else "–"


def duration(seconds: object) -> str:
    """3700 -> '1 h 2 min', 95 -> '1 min 35 s'."""
    if not isinstance(seconds, int | float) or not number(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.{0 if seconds >= 10 else 1}f}\u00a0s"
    large, small, units = (round(seconds), 60, "min s") if seconds < 3600 else (round(seconds / 60), 60, "h min")
    unit, rest = units.split()
    return f"{large // small}\u00a0{unit} {large % small}\u00a0{rest}"


def signed(value: float, form: str = "{:+.3g}") -> str:
    """A difference, with its sign."""
    return number(value, form) or "?"


def label(stage: object) -> str:
    """A stage as the page calls it."""
    return NAMES.get(str(stage), str(stage))


def pair(value: object) -> tuple[float, float] | None:
    """The two numbers of an interval, or None where they are none."""
    if isinstance(value, list) and len(value) == 2 and all(number(v) for v in value):
        return float(value[0]), float(value[1])
    return None


def p_value(p: object) -> str:
    """0.04 -> '= 0.040', 1e-9 -> '= 1.0 × 10⁻⁹'."""
    if not isinstance(p, int | float) or not number(p):
        return "not recorded"
    if p >= 0.001:
        return f"=\u00a0{p:.3f}"
    if p < 1e-12:
        return "<\u00a010⁻¹²"
    mantissa, exponent = f"{p:.1e}".split("e")
    return (
        f"=\u00a0{mantissa}\u00a0×\u00a010{str(int(exponent)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"
    )


def points(interval: tuple[float, float]) -> str:
    """An interval of a difference of shares: (-0.01, 0.02) -> '−1.0 to +2.0'."""
    return f"{100 * interval[0]:+.1f} to {100 * interval[1]:+.1f}".replace("-", "−")
