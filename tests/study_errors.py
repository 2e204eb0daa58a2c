"""How often a study would be wrong: the analysis that ships beside two that are usual. `python -m tests.study_errors`.

Simulated answers of four arms, three of them compared with the first, at several mixes of noise. The first three
columns of rates are studies in which no arm differs and a winner is named all the same (5 % are allowed); the last two
are the chance to find a planted difference of 10 points, as `crossed.power` predicts it and as it comes out.
"""

from __future__ import annotations

import math
import sys

import numpy as np
from scipy.stats import t

from grpo_gsm8k.evals.crossed import Noise, copula, power, simulate
from grpo_gsm8k.evals.stats import LEVEL, holm, wilson
from grpo_gsm8k.study.analysis import decide

GAIN, ARMS, RESAMPLES = 0.1, 4, 1000
MIXES = {  # what the noise is made of: (noise, seeds, problems)
    "all of it": (Noise(0.02, 0.3, 0.3, 0.5), 3, 300),
    "no seeds": (Noise(0.0, 0.3, 0.3, 0.5), 3, 300),
    "seeds alone": (Noise(0.05, 0.05, 0.0, 0.8), 3, 500),
    "two seeds": (Noise(0.02, 0.3, 0.3, 0.5), 2, 300),
    "five seeds": (Noise(0.02, 0.3, 0.3, 0.5), 5, 300),
    "problems": (Noise(0.01, 0.3, 0.8, 0.6), 5, 300),
}


def hillis(d_S_P: np.ndarray) -> float:
    """The p-value with one approximate number of degrees of freedom (Hillis 2007)."""
    seeds, problems = d_S_P.shape
    mean = d_S_P.mean()
    of_seeds = problems * d_S_P.mean(1).var(ddof=1)
    of_problems = seeds * d_S_P.mean(0).var(ddof=1)
    rest = d_S_P - d_S_P.mean(1)[:, None] - d_S_P.mean(0)[None] + mean
    spread = of_seeds + max(of_problems - (rest**2).sum() / ((seeds - 1) * (problems - 1)), 0)
    df = (seeds - 1) * (spread / of_seeds) ** 2 if of_seeds else problems - 1
    return float(2 * t.sf(abs(mean) / math.sqrt(spread / d_S_P.size), df)) if spread else 1.0


def bootstrap(d_S_P: np.ndarray, rng: np.random.Generator) -> float:
    """The p-value of a hierarchical bootstrap: seeds and problems drawn anew, each with its replacement."""
    seeds, problems = d_S_P.shape
    s = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES) / seeds
    p = rng.multinomial(problems, np.full(problems, 1 / problems), size=RESAMPLES) / problems
    means = ((s @ d_S_P) * p).sum(1)
    return float(min(1.0, 2 * min((means <= 0).mean(), (means >= 0).mean())))


def rates(noise: Noise, seeds: int, problems: int, studies: int) -> dict[str, float]:
    """Shares of false winners by analysis, and of planted differences that were found."""
    rng, shares = np.random.default_rng(0), copula(noise)
    wrong = dict.fromkeys(("shipped", "hillis", "bootstrap"), 0)
    found = 0
    for _ in range(studies):
        drawn = simulate([0.0] * ARMS, noise, seeds, problems, rng, shares)
        differences = [drawn[a] - drawn[0] for a in range(1, ARMS)]
        wrong["shipped"] += any(v.sign for v in decide(drawn[0], {str(a): drawn[a] for a in range(1, ARMS)}).values())
        wrong["hillis"] += min(holm([hillis(d) for d in differences])) < LEVEL
        wrong["bootstrap"] += min(holm([bootstrap(d, rng) for d in differences])) < LEVEL
        drawn = simulate([0.0, -GAIN, *[0.0] * (ARMS - 2)], noise, seeds, problems, rng, shares)
        found += decide(drawn[0], {str(a): drawn[a] for a in range(1, ARMS)})["1"].sign < 0
    predicted = power(GAIN, noise, seeds, problems, LEVEL / (ARMS - 1))
    return {**{name: n / studies for name, n in wrong.items()}, "predicted": predicted, "found": found / studies}


def main(studies: int) -> None:
    """A row a mix."""
    print(f"{studies} studies of each mix; a rate of 5 % has the 95 % interval {wilson(studies // 20, studies)}")
    print(f"{'noise':12} {'seeds':>5} {'problems':>8}  mixed model   Hillis  bootstrap   power: predicted  found")
    for name, (noise, seeds, problems) in MIXES.items():
        row = {key: f"{100 * value:.1f} %" for key, value in rates(noise, seeds, problems, studies).items()}
        print(
            f"{name:12} {seeds:5} {problems:8}  {row['shipped']:>11} {row['hillis']:>8} {row['bootstrap']:>10}"
            f"   {row['predicted']:>16} {row['found']:>6}"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
