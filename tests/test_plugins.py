"""A user's own code by name: every way to name it wrongly, and everything it can raise, is one line."""

from __future__ import annotations

import sys

import pytest
import torch

from grpo_gsm8k import grpo, plugins
from grpo_gsm8k.datatypes import Grade
from grpo_gsm8k.errors import ConfigError, NonFiniteError
from grpo_gsm8k.trainer.batch import make_batch
from grpo_gsm8k.trainer.losses import Loss, UserLoss, make_loss
from tests.toys import cli, rows, stage_config

SOURCE = """
from dataclasses import dataclass
import torch

CONSTANT = 3

class Shape:
    square = staticmethod(lambda x: x * x)

@dataclass(frozen=True)
class Mine:
    clip_eps: float = 0.5
    strength: float = 2.0
    separable = True
    def __call__(self, logp, batch):
        return -self.strength * (1 + self.clip_eps) * batch.advantages * logp
    def clipped(self, logp, batch):
        return logp > -1, logp < -3

class Bare:
    def __call__(self, logp, batch):
        return -logp * batch.advantages

def function(logp, batch):
    return -logp

class Raises:
    def __call__(self, logp, batch):
        return {}["nothing"]

class Scalar:
    def __call__(self, logp, batch):
        return logp.sum()

class Words:
    def __call__(self, logp, batch):
        return "a loss"

class Needs:
    def __init__(self, what):
        self.what = what

def centred(grades):
    mean = sum(grade.reward for grade in grades) / len(grades)
    return [grade.reward - mean for grade in grades]

def short(grades):
    return [1.0]

def nan(grades):
    return [float("nan") for _ in grades]

def words(grades):
    return ["good" for _ in grades]

def nothing(grades):
    return None
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder with modules of the user's own, in which the command is typed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    files = {
        "mine": SOURCE,
        "raises": "x = 1\n1 / 0\n",
        "exits": "import sys\nsys.exit(3)\n",
        "broken": "def f(:\n",
        "lacks": "import no_such_package_anywhere\n",
    }
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
    yield tmp_path
    for name in files:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("mine", "must be a, b, or package.module:name"),
        ("mine:", "must be"),
        (":f", "must be"),
        ("", "must be"),
        ("no_such_module:f", "no module 'no_such_module'"),
        ("mine.sub:f", "no module"),
        ("mine.py:function", "write mine:function"),
        ("./mine:function", "write mine:function"),
        ("mine:functoin", "mine has no 'functoin'.*mine.py.*did you mean 'function'"),
        ("mine:CONSTANT", "CONSTANT is a int, and cannot be called"),
        ("raises:f", "raises.py:2: ZeroDivisionError: division by zero"),
        ("exits:f", "exits.py:2: SystemExit: 3"),
        ("broken:f", "broken.py:1: SyntaxError"),
        ("lacks:f", "lacks.py:1: No module named 'no_such_package_anywhere'"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(mine, spec, words):
    with pytest.raises(ConfigError, match=words) as caught:
        plugins.load_object(spec, "thing", ["a", "b"])
    assert str(caught.value).startswith(f"thing {spec!r}: ") and "\n" not in str(caught.value)


def test_a_near_miss_names_the_nearest(mine):
    with pytest.raises(ConfigError, match="did you mean 'grpo_clip'"):
        make_loss("grpo_clop", {})


def test_attributes_of_attributes(mine):
    assert plugins.load_object("mine:Shape.square", "thing")(3) == 9


def test_errors_of_the_package_and_those_that_the_caller_handles_pass():
    for error, passed in ((NonFiniteError("x"), ()), (KeyError("x"), (KeyError,))):
        with pytest.raises(type(error)), plugins.calling("thing", *passed):
            raise error
    with pytest.raises(ConfigError, match=r"thing: .*test_plugins.py:\d+: KeyError: 'x'"), plugins.calling("thing"):
        raise KeyError("x")


# ------------------------------------------------------------------------------------------------------- losses


def toy():
    batch = make_batch(rows(([1, 2, 3], 1), advantage=2.0, logprob=-1.0))
    return torch.full(batch.mask.shape, -2.0, requires_grad=True), batch


def test_a_loss_of_the_users_own_takes_the_settings_that_it_declares(mine):
    loss, (logp, batch) = make_loss("mine:Mine", {"clip_eps": 0.25, "lr": 1.0}), toy()
    assert isinstance(loss, Loss) and loss.separable and not loss.zero_without_advantage and not loss.supervised
    assert torch.equal(loss(logp, batch).detach(), torch.full((1, 2), 2.0 * 1.25 * 2 * 2))
    above, below = loss.clipped(logp, batch)
    assert not above.any() and not below.any()
    for bare in ("mine:Bare", "mine:function"):  # nothing declared: nothing assumed
        found = make_loss(bare, {"clip_eps": 0.25})
        assert not (found.separable or found.zero_without_advantage or found.supervised)
        assert found(logp, batch).shape == (1, 2) and not torch.cat(found.clipped(logp, batch)).any()


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("mine:Raises", "mine.py:29: KeyError: 'nothing'"),
        ("mine:Scalar", r"the loss is \(\), must be a tensor like logp, \(1, 2\)"),
        ("mine:Words", "the loss is a str"),
        ("mine:Needs", "TypeError"),
        ("mine:Shape", "a Shape cannot be called"),
    ],
)
def test_a_loss_that_raises_or_returns_nonsense_is_one_line(mine, spec, words):
    logp, batch = toy()
    with pytest.raises(ConfigError, match=words) as caught:
        make_loss(spec, {})(logp, batch)
    assert str(caught.value).startswith(f"loss {spec!r}: ") and "\n" not in str(caught.value)


def test_a_gpu_that_is_full_is_not_the_losss_fault():
    def full(logp, batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        UserLoss("mine:full", full)(*toy())


def test_a_users_loss_reaches_another_process_by_its_name(mine):
    import pickle

    loss, (logp, batch) = make_loss("mine:Mine", {"clip_eps": 0.25}), toy()
    again = pickle.loads(pickle.dumps(loss))
    assert torch.equal(again(logp, batch), loss(logp, batch)) and again.separable


# --------------------------------------------------------------------------------------------------- advantages


def test_an_advantage_of_the_users_own(mine):
    grades = [Grade(1.0), Grade(0.0), Grade(0.5)]
    cfg = stage_config("grpo", advantage="mine:centred")
    grpo.check(cfg)
    assert grpo.advantages_of(cfg, grades) == [0.5, -0.5, 0.0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("short", "must be as many numbers"),
        ("nan", "must be as many numbers"),
        ("words", "ValueError"),
        ("nothing", "TypeError"),
        ("no_such", "has no 'no_such'"),
    ],
)
def test_an_advantage_that_is_nonsense_is_one_line(mine, name, words):
    cfg = stage_config("grpo", advantage=f"mine:{name}")
    with pytest.raises(ConfigError, match=words) as caught:
        grpo.advantages_of(cfg, [Grade(1.0), Grade(0.0)])
    assert "\n" not in str(caught.value)


def test_a_run_with_a_loss_and_an_advantage_from_outside(mine, tiny):
    where = ("--model_id", tiny.model, "--data", tiny.data, "--device", "cpu", "--eval_every", "0")
    sizes = ("--rollouts_per_step", "8", "--group_size", "4", "--steps", "2", "--max_new_tokens", "8")
    own = ("--loss", "mine:Mine", "--advantage", "mine:centred", "--clip_eps", "0.1", "--prompt_style", "gsm8k")
    done = cli("grpo", *where, *sizes, *own, "--out_dir", mine / "run", cwd=mine)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'loss = "mine:Mine"' in (mine / "run/config.toml").read_text()
    wrong = cli("grpo", *where, *sizes, "--loss", "mine:Raises", "--prompt_style", "gsm8k", cwd=mine)
    assert wrong.returncode == 2 and "mine.py:29: KeyError" in wrong.stderr and "Traceback" not in wrong.stderr
