"""Rollouts on disk and the hash chain: what is written, what survives a kill, what a changed byte does to it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from grpo_gsm8k import ei, grpo, sft
from grpo_gsm8k.datatypes import Example, Grade, Prompt, Rollout, Trajectory
from grpo_gsm8k.errors import DataError, RunDirError
from grpo_gsm8k.runs import chain, rollouts
from grpo_gsm8k.runs.files import sha256_file
from grpo_gsm8k.trainer.policy import weights_sha256
from tests.toys import stage_config


def one(text: str, logprobs=(-0.1, -2.5), **grade) -> Rollout:
    prompt = Prompt(Example("a", "How many?", "5"), (1, 70_000, 2), "<think>")
    drawn = Trajectory(prompt, (3, 4), (1, 0), logprobs, "length", 7, 2**62 + 1, text, 2)
    return Rollout(drawn, Grade(**{"reward": 0.1, "components": {"form": 0.1}, **grade}), -1 / 3)


def test_rollouts_come_back_as_they_were_to_the_last_bit(tmp_path):
    groups = [
        [one("né\n"), one("x", correct=True, answer="5", details={"strict": False})],
        [replace(one("", format_ok=False), advantage=0.0)],
    ]
    stored = rollouts.Stored("grpo", 12, "a" * 64, "b" * 64, groups)
    path = rollouts.write(tmp_path, stored)
    assert path == tmp_path / "rollouts/step_000012.safetensors"
    assert rollouts.read(path, {"a": groups[0][0].trajectory.prompt.example}) == stored
    bare = rollouts.read(path).groups[0][0].trajectory
    assert bare.prompt.example == Example("a", "") and bare.prompt.token_ids == (1, 70_000, 2)
    with safe_open(path, "np") as file:  # any reader of safetensors finds plain columns
        assert file.get_tensor("token_ids").tolist() == [3, 4] * 3 and file.get_tensor("lengths").tolist() == [2, 2, 2]
        assert file.get_tensor("rewards").dtype == "float64"  # 0.1 would lose bits
    assert path.read_bytes() == rollouts.write(tmp_path / "again", stored).read_bytes()


def test_narrow_numbers_are_taken_where_they_keep_every_bit(tmp_path):
    exact = [[one("x", logprobs=(-0.5, -0.25))]]
    with safe_open(rollouts.write(tmp_path, rollouts.Stored("grpo", 1, "", "", exact)), "np") as file:
        assert file.get_tensor("logprobs").dtype == "float32" and file.get_tensor("prompt_ids").dtype == "int32"


def test_a_file_that_holds_no_rollouts_is_refused(tmp_path):
    path = tmp_path / "step_000001.safetensors"
    with pytest.raises(DataError, match="does not exist"):
        rollouts.read(path)
    path.write_bytes(b"not safetensors")
    with pytest.raises(DataError, match="not a whole file of rollouts"):
        rollouts.read(path)
    save_file({}, path, {"rollouts": json.dumps({"format": 2})})
    with pytest.raises(RunDirError, match="of format 2; this version reads format 1"):
        rollouts.read(path)


# ------------------------------------------------------------------------------------------------------ the chain

REWARD = "tests.toys:even_tokens"


def config_of(tiny, out, stage="grpo", **flags):
    own = {"sft": {"epochs": 1, "batch_size": 12, "lr": 1e-3}, "ei": {"rounds": 1, "steps_per_round": 3}}
    own["grpo"] = {"steps": 4, "rollouts_per_step": 8, "group_size": 4, "reward": REWARD, "lr": 1e-2}
    where = {"model_id": str(tiny.model), "data": str(tiny.data), "out_dir": str(out), "resume": True}
    return stage_config(stage, **where, **{"eval_every": 2, "save_every": 2, **own[stage], **flags})


def links_of(run):
    links, faults = chain.read(run)
    assert not faults
    return links


def covered(run):
    """File → hash, as the chain has it."""
    live = {}
    for link in links_of(run):
        chain.apply(live, link)
    return live


def whole(run):
    """Whether the chain covers every file as it is, and every row of the log."""
    live = covered(run)
    manifests = {name: run / name / "manifest.json" for name in live if name.startswith("checkpoints/")}
    assert all(sha256_file(manifests.get(name, run / name)) == digest for name, digest in live.items())
    free = {p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file() and "checkpoints" not in p.parts}
    assert free - set(live) == {"chain.jsonl", "metrics.jsonl", ".lock"}
    assert set(manifests) == {f"checkpoints/{p.name}" for p in (run / "checkpoints").iterdir()}
    rows = sum(link.get("metrics", {}).get("rows", 0) for link in links_of(run))
    return rows == len((run / "metrics.jsonl").read_text().splitlines())


def test_a_run_is_covered_step_by_step_and_its_rollouts_name_the_weights(tiny, tmp_path):
    result = grpo.run(config_of(tiny, tmp_path / "run", async_save=False))
    run = tmp_path / "run"
    assert whole(run)
    links = links_of(run)
    kinds = [(link["kind"], link["step"]) for link in links]
    assert kinds == [
        ("begin", 0), ("step", 1), ("step", 2), ("checkpoint", 2), ("step", 3), ("step", 4), ("checkpoint", 4),
        ("end", 4),
    ]  # fmt: skip
    weights = {link["step"]: link["weights"] for link in links}
    assert weights[4] == result["weights_sha256"] and len(set(weights.values())) == 5
    stored = [rollouts.read(run / rollouts.name_of(step)) for step in (1, 2, 3, 4)]
    assert [(one.before, one.after) for one in stored] == [(weights[k - 1], weights[k]) for k in (1, 2, 3, 4)]
    assert links[1]["grades"] == rollouts.grades_sha256(stored[0].groups)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(run / "checkpoints/step_000002")
    assert weights_sha256(model.named_parameters()) == stored[1].after
    size = sum(path.stat().st_size for path in (run / "rollouts").iterdir())
    assert result["rollouts_bytes"] == size > 0


@pytest.mark.slow
def test_a_checkpoint_that_is_written_meanwhile_is_in_a_later_link(tiny, tmp_path):
    grpo.run(config_of(tiny, tmp_path / "run", async_save=True))
    assert whole(tmp_path / "run")
    named = {name: link["step"] for link in links_of(tmp_path / "run") for name in link.get("files", {})}
    assert 2 <= named["checkpoints/step_000002"] <= 4 and named["checkpoints/step_000004"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "ei"])
def test_the_other_stages_have_a_chain(tiny, tmp_path, stage, monkeypatch):
    monkeypatch.setattr(ei, "keep_right", lambda cfg, group: list(group[:2]))
    more = {"prompts_per_round": 4, "samples_per_prompt": 3, "batch_size": 4} if stage == "ei" else {}
    {"sft": sft.run, "ei": ei.run}[stage](config_of(tiny, tmp_path / "run", stage, **more))
    run = tmp_path / "run"
    assert whole(run)
    assert all(link["weights"] for link in links_of(run))
    if stage == "ei":  # what is kept has advantage 1
        groups = rollouts.read(run / rollouts.name_of(1)).groups
        assert [[r.advantage for r in group] for group in groups] == [[1.0, 1.0, 0.0]] * 4


@pytest.mark.slow
def test_rollouts_are_pruned_and_left_out_as_asked(tiny, tmp_path):
    grpo.run(config_of(tiny, tmp_path / "two", keep_rollouts=2))
    assert sorted(p.name for p in (tmp_path / "two/rollouts").iterdir()) == [
        "step_000003.safetensors",
        "step_000004.safetensors",
    ]
    assert whole(tmp_path / "two")
    none = grpo.run(config_of(tiny, tmp_path / "none", keep_rollouts=0))
    assert not (tmp_path / "none/rollouts").exists() and none["rollouts_bytes"] == 0
    assert all("grades" in link for link in links_of(tmp_path / "none") if link["kind"] == "step")


def test_the_chain_of_a_killed_run_goes_on_from_its_checkpoint(tiny, tmp_path):
    """The log, the rollouts and half a link are ahead of the newest checkpoint."""
    run = tmp_path / "run"
    grpo.run(config_of(tiny, run, max_steps=3))
    shutil.rmtree(run / "checkpoints/step_000003")
    with (run / "chain.jsonl").open("a") as file:
        file.write('{"link": 9, "kind": "st')
    ended = grpo.run(config_of(tiny, run))
    assert whole(run)
    kinds = [(link["kind"], link["step"]) for link in links_of(run)]
    assert ("resume", 2) in kinds and kinds.count(("step", 3)) == 1
    assert ended["weights_sha256"] == grpo.run(config_of(tiny, tmp_path / "one"))["weights_sha256"]
    assert (
        covered(run)["rollouts/step_000004.safetensors"]
        == covered(tmp_path / "one")["rollouts/step_000004.safetensors"]
    )


@pytest.mark.slow
def test_an_older_run_gets_a_chain_when_it_goes_on(tiny, tmp_path):
    run = tmp_path / "run"
    grpo.run(config_of(tiny, run, max_steps=2))
    (run / "chain.jsonl").unlink()
    grpo.run(config_of(tiny, run))
    assert links_of(run)[0]["step"] == 2 and whole(run)


def test_a_link_that_was_changed_is_named(tmp_path):
    made = chain.Chain(tmp_path)
    made.open(0, code="abc")
    for step in (1, 2):
        (tmp_path / "metrics.jsonl").open("a").write(json.dumps({"step": step}) + "\n")
        made.seal("step", step)
    path = tmp_path / "chain.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    assert [link["step"] for link in links_of(tmp_path)] == [0, 1, 2]
    for damaged, what in [
        ([lines[0], lines[1].replace(b'"rows": 1', b'"rows": 2'), lines[2]], "line 2 was changed"),
        ([lines[0], lines[2]], "line 2 does not continue"),
        ([lines[0], lines[1].replace(b": ", b":\t", 1), lines[2]], "line 2 is not a whole link"),
        ([*lines[:2], lines[2][:-1]], "line 3 is not a whole link"),
    ]:
        path.write_bytes(b"".join(damaged))
        assert chain.read(tmp_path)[1][0].what.startswith(what)
    path.write_bytes(b"".join(lines).replace(b'"format": 1', b'"format": 2'))
    with pytest.raises(RunDirError, match="a chain of format 2"):
        chain.read(tmp_path)
