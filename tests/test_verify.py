"""Runs held to their word: changed bytes, forged chains, copies, and what is no run."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from grpo_gsm8k import config, grpo, pipeline
from grpo_gsm8k.audit.files import manifest_of
from grpo_gsm8k.audit.fork import fork
from grpo_gsm8k.audit.replay import replay
from grpo_gsm8k.audit.verify import Options, lines_of, verify
from grpo_gsm8k.errors import ConfigError, DataError, RunDirError
from grpo_gsm8k.report import write_report
from grpo_gsm8k.runs import chain, rollouts
from grpo_gsm8k.runs.files import json_line, read_jsonl, sha256_file, write_json, write_jsonl
from tests.test_chain import config_of
from tests.toys import cli

FEW = (
    *("toy.train=60", "toy.val=8", "toy.test=10", "toy.tiny=true", "tiny_model.hidden_size=32", "tiny_model.layers=1"),
    *("common.eval_examples=4", "common.max_new_tokens=12", "common.save_every=2", "sft.epochs=1", "sft.batch_size=16"),
    *("sft.eval_every=2", "ei.prompts_per_round=4", "ei.steps_per_round=2", "ei.eval_every=2"),
    *("grpo.steps=3", "grpo.rollouts_per_step=8", "grpo.group_size=4", "grpo.eval_every=2", "grpo.reward=random"),
)
NOT_RECORDED = {".lock"}


def run_pipeline(folder: Path) -> Path:
    pipeline.run(config.build(config.PipelineConfig, {"out_dir": str(folder)}), sets=FEW)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A pipeline of all four stages, copied to another place; where it was made there is nothing any more."""
    made = run_pipeline(tmp_path_factory.mktemp("made") / "run")
    copy = tmp_path_factory.mktemp("copied") / "elsewhere"
    shutil.move(made, copy)
    return copy


@pytest.fixture(scope="module")
def one(tiny, tmp_path_factory):
    """A GRPO run whose task gives its rewards."""
    folder = tmp_path_factory.mktemp("one") / "run"
    grpo.run(config_of(tiny, folder, reward="random", save_every=3))
    return folder


def copied(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "copy"))


@pytest.mark.slow
def test_a_pipeline_is_verified_where_it_was_copied_to(whole):
    found = verify(whole, Options(steps=2))
    assert found["ok"], "\n".join(lines_of(found))
    assert [part["name"] for part in found["parts"]] == ["pipeline", "sft", "ei", "grpo"]
    assert not any(part["unchecked"] or part["close"] for part in found["parts"]), "\n".join(lines_of(found))
    said = "\n".join(lines_of(found))
    assert "4 evaluations on the test split" in said and said.count("the same weights after each") == 3
    assert "completions sampled again, the same ids" in said and "the run is what it says it is" in said


def change_a_byte(run, draw):
    """One byte of one file; the file."""
    files = sorted(p for p in run.rglob("*") if p.is_file() and p.stat().st_size and p.name not in NOT_RECORDED)
    path = draw.choice(files)
    content, at = bytearray(path.read_bytes()), draw.randrange(path.stat().st_size)
    before = bytes(content)
    content[at] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return path, before


def located(found, run):
    """The files that are named as damaged."""
    where = {"pipeline": run, run.name: run}
    return {where.get(one["part"], run / one["part"]) / one["file"] for one in found["damage"]}


def change_a_hundred_bytes(run, draw):
    """Change one byte of the run's files a hundred times; each must be found in its file and at its step."""
    for _ in range(100):
        path, before = change_a_byte(run, draw)
        found = verify(run, Options(steps=0))
        assert not found["ok"] and located(found, run) == {path}
        if numbered := re.search(r"step_(\d+)", str(path.relative_to(run))):
            assert {one["step"] for one in found["damage"]} == {int(numbered[1])}
        path.write_bytes(before)
    assert verify(run, Options(steps=0))["ok"]


def test_a_hundred_changed_bytes_are_all_found_where_they_are(one):
    change_a_hundred_bytes(one, random.Random(0))


@pytest.mark.slow
def test_a_hundred_changed_bytes_of_a_pipeline_are_all_found(whole):
    change_a_hundred_bytes(whole, random.Random(0))


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("rollouts/step_000002.safetensors", 2),
        ("checkpoints/step_000003/model.safetensors", 3),
        ("checkpoints/step_000003", 3),
        ("metrics.jsonl", 1),
        ("config.toml", None),
    ],
)
def test_a_missing_file_is_found(one, tmp_path, name, step):
    run = copied(one, tmp_path)
    shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
    (damage,) = verify(run, Options())["damage"]
    assert (damage["file"], damage["step"], damage["what"]) == (name, step, "is missing")


@pytest.mark.slow
def test_the_whole_stage_of_a_pipeline_is_missed(whole, tmp_path):
    run = copied(whole, tmp_path)
    shutil.rmtree(run / "ei")
    assert [one["file"] for one in verify(run, Options())["damage"]] == ["ei"]


# ------------------------------------------------------------------------------- whoever writes the chain anew


def forge(run, links=None):
    """Write the chain anew over the files as they are, and the manifests of the checkpoints."""
    for folder in (run / "checkpoints").iterdir():
        manifest = json.loads((folder / "manifest.json").read_text())
        hashes = {name: sha256_file(folder / name) for name in manifest_of(folder)}
        write_json(folder / "manifest.json", {**manifest, "sha256": hashes})
    raw, previous, out = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True), "", []
    for link in links or chain.read(run)[0]:
        where = {name: run / name for name in link.get("files", {})}
        where = {n: p / "manifest.json" if n.startswith("checkpoints/") else p for n, p in where.items()}
        if where:
            link["files"] = {name: sha256_file(path) for name, path in where.items()}
        if "metrics" in link:
            rows, raw = raw[: link["metrics"]["rows"]], raw[link["metrics"]["rows"] :]
            link["metrics"]["sha256"] = hashlib.sha256(b"".join(rows)).hexdigest()
        link["previous"] = previous
        link["hash"] = previous = chain.hash_of(link)
        out.append(json_line(link))
    (run / "chain.jsonl").write_bytes(b"".join(out))


def with_rollouts(run, step, change):
    path = run / rollouts.name_of(step)
    stored = rollouts.read(path)
    path.unlink()
    rollouts.write(run, change(stored))


def better_reward(stored):
    first = stored.groups[1][0]
    better = replace(first, grade=replace(first.grade, reward=first.grade.reward + 1))
    return replace(stored, groups=[stored.groups[0], [better, *stored.groups[1][1:]], *stored.groups[2:]])


def other_token(stored):
    first = stored.groups[0][0]
    ids = first.trajectory.token_ids
    other = replace(first, trajectory=replace(first.trajectory, token_ids=((ids[0] + 1) % 300, *ids[1:])))
    return replace(stored, groups=[[other, *stored.groups[0][1:]], *stored.groups[1:]])


def test_a_forged_reward_is_found_by_grading_again(one, tmp_path):
    run = copied(one, tmp_path)
    with_rollouts(run, 2, better_reward)
    forge(run)
    damage = verify(run, Options(steps=0))["damage"]
    assert (damage[0]["file"], damage[0]["step"]) == ("rollouts/step_000002.safetensors", 2)
    assert damage[0]["what"].startswith("rollout 4 (example") and "reward" in damage[0]["what"]


def test_a_forged_completion_is_found_by_sampling_again(one, tmp_path):
    run = copied(one, tmp_path)
    with_rollouts(run, 2, other_token)
    forge(run)
    damage = verify(run, Options(steps=4))["damage"]
    assert any(d["step"] == 2 and "completion 0 differs from its token 0 on" in d["what"] for d in damage)


@pytest.mark.parametrize(("metric", "how"), [("reward/mean", "does not follow"), ("loss", "was recorded")])
def test_a_forged_metric_is_found_by_computing_it_again(one, tmp_path, metric, how):
    run = copied(one, tmp_path)
    rows = [row for _, row in read_jsonl(run / "metrics.jsonl")]
    rows[2][metric] += 0.125
    write_jsonl(run / "metrics.jsonl", rows)
    forge(run)
    damage = verify(run, Options(steps=4))["damage"]
    assert [(d["file"], d["step"]) for d in damage] == [("metrics.jsonl", 3)]
    assert metric in damage[0]["what"] and how in damage[0]["what"]


def test_a_forged_evaluation_is_found(one, tmp_path):
    run = copied(one, tmp_path)
    path = run / "evals/step_000002.jsonl"
    rows = [row for _, row in read_jsonl(path)]
    rows[1]["correct"] = not rows[1]["correct"]
    write_jsonl(path, rows)
    forge(run)
    (damage,) = verify(run, Options(steps=0))["damage"]
    assert (damage["file"], damage["step"]) == ("evals/step_000002.jsonl", 2) and "row 2" in damage["what"]


@pytest.mark.slow
def test_forged_weights_are_found_by_training_again(one, tmp_path):
    run = copied(one, tmp_path)
    weights = run / "checkpoints/step_000003/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    forge(run)
    (damage,) = verify(run, Options(steps=4))["damage"]
    assert damage["file"] == "checkpoints/step_000003" and "does not have the weights" in damage["what"]


def test_the_published_hash_gives_a_forged_chain_away(one, tmp_path):
    head = verify(one, Options(steps=0))["head"]
    assert verify(one, Options(steps=0, head=head))["ok"]
    run = copied(one, tmp_path)
    with_rollouts(run, 2, better_reward)
    forge(run)
    (damage,) = verify(run, Options(steps=0, head=head))["damage"]
    assert damage["file"] == "chain.jsonl" and head in damage["what"]


# ---------------------------------------------------------------------------------------- reports, code, versions


@pytest.mark.slow
def test_a_report_that_is_written_again_belongs_to_the_run(one, tmp_path):
    run = copied(one, tmp_path)
    for _ in range(2):
        page = write_report([run])
        assert verify(run, Options(steps=0))["ok"]
    page.write_text(page.read_text() + " ")
    assert [d["file"] for d in verify(run, Options(steps=0))["damage"]] == ["report.html"]


def test_a_file_that_nobody_recorded_is_named(one, tmp_path):
    run = copied(one, tmp_path)
    (run / "notes.txt").write_text("mine")
    found = verify(run, Options(steps=0))
    assert found["ok"] and "notes.txt: the chain says nothing about it" in found["parts"][0]["unchecked"]


def test_code_that_a_run_names_is_not_imported_unasked(tiny, tmp_path, monkeypatch):
    """Neither from where the command is typed nor from the run directory itself."""
    run = tmp_path / "run"
    grpo.run(config_of(tiny, run, steps=2, eval_every=0))
    text = (run / "config.toml").read_text().replace("tests.toys:even_tokens", "evil:fn")
    (run / "config.toml").write_text(text)
    (run / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef fn(c, e): return 1.0\n")
    forge(run)
    monkeypatch.chdir(run)
    found = verify(Path(), Options(steps=1))
    assert any("reward evil:fn" in text and "--own_code" in text for text in found["parts"][0]["unchecked"])
    with pytest.raises(ConfigError, match="nothing is imported from a run directory"):
        replay(Path(), 1, own_code=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_another_machine_is_held_to_a_tolerance(one, tmp_path):
    run = copied(one, tmp_path)
    machine = json.loads((run / "sys/machine.json").read_text())
    write_json(run / "sys/machine.json", {**machine, "cpu_model": "another"})
    rows = [row for _, row in read_jsonl(run / "metrics.jsonl")]
    rows[0]["policy/grad_norm"] *= 1 + 1e-6
    write_jsonl(run / "metrics.jsonl", rows)
    for link in (links := chain.read(run)[0]):
        if link["step"] == 1:
            link["weights"] = "0" * 64
    forge(run, links)
    (part,) = verify(run, Options(steps=4))["parts"]
    assert not part["damage"]
    assert any(text.startswith("step 1 trained again: the weights differ") for text in part["close"])
    assert any("cpu_model another then" in text for text in part["close"])


def test_a_run_of_an_older_version_is_read_as_far_as_it_goes(one, tmp_path):
    run = copied(one, tmp_path)
    (run / "chain.jsonl").unlink()
    shutil.rmtree(run / "rollouts")
    stored = (run / "config.toml").read_text().splitlines()
    (run / "config.toml").write_text("\n".join(line for line in stored if not line.startswith("keep_rollouts")))
    found = verify(run, Options())
    said = "\n".join(lines_of(found))
    assert found["ok"] and "has no chain.jsonl" in said and "evaluations: graded again" in said
    with pytest.raises(DataError, match="kept no rollouts of this step"):
        replay(run, 2)
    (run / "config.toml").write_text((run / "config.toml").read_text() + "\nof_tomorrow = 1\n")
    with pytest.raises(RunDirError, match="'of_tomorrow', which this version does not know"):
        verify(run, Options())


def test_what_is_no_run_is_refused_in_one_line(tmp_path, one):
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/config.toml").write_text("[eval]\nlimit = 1\n")
    for folder, what in [
        (tmp_path / "nowhere", "no such directory"),
        (tmp_path / "empty", "has no config.toml"),
        (tmp_path / "odd", "is a run of eval, not of sft, ei, grpo, distill"),
    ]:
        with pytest.raises(RunDirError, match=what):
            verify(folder, Options())
    (tmp_path / "empty/pipeline_config.json").write_text("{}")
    with pytest.raises(RunDirError, match="is a pipeline; name one of its stages"):
        replay(tmp_path / "empty", 1)
    with pytest.raises(ConfigError, match="has the steps 1 to 4"):
        replay(one, 5)


@pytest.mark.slow
def test_the_commands_print_one_object_and_end_with_their_code(one, tmp_path):
    done = cli("replay", one, "--step", "2", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["verdict"] == "bitwise"
    done = cli("fork", one, "--at", "2", "--out_dir", tmp_path / "fork")
    assert done.returncode == 2 and "the nearest: 3" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    run = copied(one, tmp_path)
    (run / "command.txt").write_text("another")
    done = cli("verify", run)
    assert done.returncode == 1 and "DAMAGED: command.txt: was changed" in done.stdout


@pytest.mark.slow
def test_the_demo_is_what_it_says_it_is(tmp_path):
    """All of docs/replay.md on the demo: verified in time, replayed, forked, and a hundred bytes changed."""
    run, draw = tmp_path / "demo", random.Random(0)
    pipeline.run(config.build(config.PipelineConfig, {"out_dir": str(run)}), sets=["common.keep_last=9"])
    found = verify(run, Options())
    assert found["ok"] and not any(part["close"] or part["unchecked"] for part in found["parts"])
    assert found["seconds"] <= found["recorded_seconds"] + 30, found["seconds"]
    print("\n".join(lines_of(found)))
    steps = draw.sample(range(1, 51), 10)
    assert [replay(run / "grpo", step)["verdict"] for step in steps] == ["bitwise"] * 10
    for stage, at in [("grpo", 0), ("grpo", 20), ("grpo", 40), ("grpo", 50), ("sft", 2000)]:
        ended = json.loads((run / stage / "result.json").read_text())["weights_sha256"]
        assert fork(run / stage, at, [], tmp_path / f"{stage}{at}")["weights_sha256"] == ended
    change_a_hundred_bytes(run, draw)
