"""Settings: declared once, layered, and never silently wrong."""

from __future__ import annotations

import dataclasses
import math
import tomllib

import pytest

from grpo_gsm8k import config, grpo
from grpo_gsm8k.errors import ConfigError


def test_layers_from_weak_to_strong(tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text("[common]\nseed = 4\nlr = 0.25\n[grpo]\nlr = 0.5\ngroup_size = 4\n")
    cfg = config.resolve("grpo", preset="quick", config_file=recipe, flags={"group_size": 2})
    assert (cfg.seed, cfg.lr, cfg.group_size, cfg.steps) == (4, 0.5, 2, 100)
    assert config.resolve("sft", preset="quick", config_file=recipe).lr == 0.25
    assert config.resolve("grpo", flags={"lr": 1e-3}, sets=["lr=2e-3"]).lr == 2e-3


def test_sets_may_name_a_section():
    assert config.resolve("grpo", sets=["grpo.lr=0.5", "sft.lr=0.25"]).lr == 0.5
    assert config.resolve("sft", sets=["grpo.lr=0.5", "sft.lr=0.25"]).lr == 0.25


def test_an_algorithm_is_laid_over_the_recipe_and_under_what_is_typed(tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text("[common]\nlr = 0.5\n[grpo]\nclip_eps = 0.1\nkl_coef = 0.5\nloss = 'cispo'\n")
    typed = {"algorithm": "dapo", "clip_eps_high": 0.3}
    cfg = config.resolve(
        "grpo", preset="quick", config_file=recipe, flags=typed, sets=["grpo.resample_zero_variance=2"]
    )
    assert (cfg.loss, cfg.clip_eps, cfg.kl_coef, cfg.aggregation) == ("grpo_clip", 0.2, 0.0, "token")  # the paper's
    assert (cfg.clip_eps_high, cfg.resample_zero_variance) == (0.3, 2)  # typed
    assert (cfg.lr, cfg.steps) == (0.5, 100)  # the recipe's: the paper's settings are of the objective alone
    by_set = config.resolve("grpo", flags={"clip_eps_high": 0.3}, sets=["algorithm=dapo"])
    assert (by_set.clip_eps_high, by_set.aggregation) == (0.3, "token")  # typed is typed


def test_an_algorithm_in_a_recipe_is_weaker_than_the_keys_beside_it(tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text("[grpo]\nalgorithm = 'gspo'\nclip_eps = 0.01\n")
    cfg = config.resolve("grpo", preset="tiny", config_file=recipe, flags={"kl_coef": 0.1})
    assert (cfg.loss, cfg.clip_eps, cfg.clip_eps_high, cfg.kl_coef) == ("gspo", 0.01, 4e-4, 0.1)
    other = config.resolve("grpo", config_file=recipe, flags={"algorithm": "rloo"})
    assert (other.loss, other.clip_eps, other.baseline) == ("reinforce", 0.2, "leave_one_out")
    # What a run writes down says the same without knowing the algorithm.
    written = tmp_path / "config.toml"
    written.write_text(config.to_toml(cfg, "grpo"))
    assert config.resolve("grpo", config_file=written) == cfg
    assert 'loss = "gspo"' in written.read_text() and "clip_eps_high = 0.0004" in written.read_text()


def test_algorithms_leave_nothing_of_each_other_behind():
    keys = [sorted(settings) for settings in config.ALGORITHMS.values()]
    assert all(k == keys[0] for k in keys)
    for name in config.ALGORITHMS:
        grpo.check(config.resolve("grpo", flags={"algorithm": name}))
        assert config.resolve("sft", sets=[f"grpo.algorithm={name}"])
    with pytest.raises(ConfigError, match=r"unknown algorithm 'gpso'; did you mean 'gspo'\?"):
        config.resolve("grpo", flags={"algorithm": "gpso"})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[grpo]\nlearning_rate = 1.0\n", ["[grpo]", "learning_rate"]),
        ("[grpo]\ngroupsize = 1\n", ["group_size"]),
        ("[grop]\nlr = 1.0\n", ["grop", "grpo"]),
        ("[common]\nlearningrate = 1.0\n", ["learningrate"]),
        ("lr = 1.0\n", ["lr", "unknown table"]),
        ("[grpo\n", ["not a TOML file"]),
    ],
)
def test_a_wrong_recipe_names_file_and_key(tmp_path, text, words):
    recipe = tmp_path / "mine.toml"
    recipe.write_text(text)
    with pytest.raises(ConfigError) as caught:
        config.resolve("grpo", config_file=recipe)
    assert all(word in str(caught.value) for word in [*words, "mine.toml"])


@pytest.mark.parametrize(
    ("sets", "word"),
    [
        (["lr"], "key=value"),
        (["lr=fast"], "float"),
        (["group_size=2.5"], "int"),
        (["std_norm=maybe"], "bool"),
        (["aggregation=mean"], "sequence"),
        (["lrr=1"], "'lr'"),
        (["grop.lr=1"], "grpo"),
        (["sft.group_size=1"], "group_size"),
    ],
)
def test_a_wrong_set_is_refused(sets, word):
    with pytest.raises(ConfigError, match=word):
        config.resolve("grpo", sets=sets)


def test_unknown_preset():
    with pytest.raises(ConfigError, match="tiny"):
        config.resolve("grpo", preset="tinny")


def test_the_settings_that_users_of_the_original_expect():
    grpo = config.resolve("grpo")
    expected = {"steps": 200, "lr": 1e-5, "rollouts_per_step": 256, "group_size": 8, "advantage_eps": 1e-6}
    expected |= {"std_norm": True, "clip_eps": 0.2, "temperature": 1.0, "max_new_tokens": 1024}
    expected |= {"save_every": 20, "eval_every": 20, "eval_examples": 100}
    expected |= {"format_weight": 0.2, "answer_weight": 0.8}
    assert {key: getattr(grpo, key) for key in expected} == expected
    full = {name: config.resolve(name, preset="full") for name in ("sft", "grpo")}
    assert full["sft"].model_id == "Qwen/Qwen2.5-Math-1.5B"
    assert (full["sft"].batch_size, full["sft"].epochs, full["grpo"].steps) == (64, 3, 500)
    quick = {name: config.resolve(name, preset="quick") for name in ("sft", "grpo")}
    assert (quick["sft"].batch_size, quick["sft"].epochs, quick["grpo"].steps) == (32, 1, 100)


def test_every_field_has_help_and_every_preset_resolves():
    for cls in (*config.SECTIONS.values(), config.PipelineConfig):
        for field in dataclasses.fields(cls):
            assert len(field.metadata["help"]) >= 5, (cls, field.name)
    for preset in config.preset_names():
        for section in config.SECTIONS:
            config.resolve(section, preset=preset)
    assert config.preset_names() == ["full", "quick", "tiny"]


def test_a_config_written_as_toml_reads_back():
    cfg = config.resolve("grpo", flags={"think_open": 'a "quoted" \\ tag\n', "lr": 1e-7})
    table = tomllib.loads(config.to_toml(cfg, "grpo"))["grpo"]
    assert config.build(config.GrpoConfig, table) == cfg
    assert config.differences(table, cfg) == []


def test_differences_ignore_what_may_change_between_a_run_and_its_continuation():
    before = dataclasses.asdict(config.resolve("grpo"))
    now = config.resolve("grpo", flags={"max_steps": 3, "resume": True, "save_every": 1, "lr": 0.5})
    assert config.differences(before, now) == ["lr: 1e-05 then, 0.5 now"]


def test_a_device_for_vllm_says_that_vllm_samples():
    assert config.resolve("grpo").engine == "auto" and not config.resolve("grpo").uses_vllm
    for flags in ({"vllm_device": "cuda:1"}, {"vllm_devices": "cuda:1,cuda:2"}, {"engine": "vllm"}):
        cfg = config.resolve("grpo", flags=flags)
        assert cfg.uses_vllm and 'engine = "vllm"' in config.to_toml(cfg, "grpo")
    before = vars(config.resolve("grpo", flags={"vllm_device": "cuda:1"}))
    assert config.differences(before, config.resolve("grpo")) == []  # auto: as the run began
    assert config.differences(before, config.resolve("grpo", flags={"engine": "hf"})) == [
        "engine: 'vllm' then, 'hf' now"
    ]
    assert config.differences(before, config.resolve("grpo", flags={"vllm_device": "cuda:2"})) == []


def test_a_file_may_have_tables_for_one_task(tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        "[common]\nmax_new_tokens = 9\n[grpo]\nsteps = 5\ngroup_size = 4\n"
        "[task.countdown.common]\nmax_new_tokens = 7\n[task.countdown.grpo]\nsteps = 6\n"
    )
    for given in ({"task": "countdown"}, {"flags": {"task": "countdown"}}):
        cfg = config.resolve("grpo", config_file=recipe, **given)
        assert (cfg.steps, cfg.group_size, cfg.max_new_tokens) == (6, 4, 7)
    for given in ({}, {"task": "gsm8k"}, {"flags": {"task": "mine:Task"}}):
        assert config.resolve("grpo", config_file=recipe, **given).steps == 5
    assert config.resolve("grpo", config_file=recipe, task="countdown", flags={"steps": 1}).steps == 1
    recipe.write_text(recipe.read_text() + '[task."mine:Task".grpo]\nsteps = 8\n')
    assert config.resolve("grpo", config_file=recipe, flags={"task": "mine:Task"}).steps == 8
    recipe.write_text('[common]\ntask = "countdown"\n[task.countdown.grpo]\nsteps = 6\n')
    assert config.resolve("grpo", config_file=recipe).steps == 6


@pytest.mark.parametrize(
    "text, said",
    [
        ("[task.countdown.grop]\nsteps = 1", r"unknown table in \[task.countdown\] 'grop'; did you mean 'grpo'"),
        ("[task.countdown.grpo]\nstep = 1", r"\[task.countdown.grpo\] unknown key 'step'; did you mean 'steps'"),
        ("[task.countdown]\nsteps = 1", "unknown table in"),
        ("[task]\ncountdown = 1", r"must stand in a table such as \[task.countdown.grpo\]"),
        ("task = 1", r"must stand in a table such as \[task.countdown.grpo\]"),
    ],
)
def test_a_mistake_in_a_tasks_table(tmp_path, text, said):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(text)
    with pytest.raises(ConfigError, match=said):
        config.resolve("grpo", config_file=recipe)


@pytest.mark.parametrize(
    ("preset", "batch", "epochs", "steps"), [("tiny", 8, 1, 10), ("quick", 32, 1, 100), ("full", 64, 3, 500)]
)
def test_chat_has_presets_of_its_own(preset: str, batch: int, epochs: int, steps: int) -> None:
    sft = config.resolve("sft", preset=preset, flags={"task": "chat"})
    grpo = config.resolve("grpo", preset=preset, flags={"task": "chat"})
    assert (sft.batch_size, sft.epochs, grpo.steps) == (batch, epochs, steps)
    assert grpo.rollouts_per_step == batch * grpo.group_size
    assert grpo.algorithm in ("importance_sampling", "ppo")
    assert config.resolve("sft", preset=preset, flags={"task": "gsm8k"}) != sft
    assert config.resolve("grpo", preset=preset, flags={"task": "../presets/chat"}).algorithm == ""
    assert (config.resolve("toy", preset=preset, task="chat").train < 18000) == (preset == "tiny")


def test_a_common_key_is_for_every_stage_that_knows_it() -> None:
    sets = ["common.length_words=12", "common.epochs=2"]
    assert [config.resolve(stage, sets=sets).length_words for stage in ("sft", "grpo", "eval")] == [12, 12, 12]
    assert config.resolve("sft", sets=sets).epochs == 2
    with pytest.raises(ConfigError, match="did you mean 'length_words'"):
        config.resolve("sft", sets=["common.lenght_words=12"])


def test_importance_sampling_is_the_surrogate_without_its_clip() -> None:
    cfg = config.resolve("grpo", flags={"algorithm": "importance_sampling"})
    assert (cfg.loss, cfg.clip_eps, cfg.std_norm) == ("grpo_clip", 1.0, False)
    assert cfg.clip_eps_high > math.exp(20)  # log-ratios are bounded by 20


def test_every_value_is_traced_to_the_layer_that_set_it(tmp_path, monkeypatch) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text("[common]\nmodel_id = 'm'\nseed = 3\n[grpo]\nsteps = 7\n[task.countdown.grpo]\ntop_p = 1.0\n")
    monkeypatch.setenv("WANDB_PROJECT", "from-the-shell")
    given = {"preset": "quick", "config_file": recipe, "flags": {"task": "countdown", "vllm_device": "cpu"}}
    given |= {"sets": ["grpo.lr=0.5", "algorithm=dapo", "sft.lr=2"]}
    cfg, origin = config.explain("grpo", **given)
    assert cfg == config.resolve("grpo", **given)
    expected = {
        "beta1": ("default", ""),
        "prompt_style": ("preset", "presets/quick.toml [common]"),
        "seed": ("file", f"{recipe} [common]"),
        "steps": ("file", f"{recipe} [grpo]"),
        "top_p": ("task", f"{recipe} [task.countdown.grpo]"),
        "wandb_project": ("env", "WANDB_PROJECT"),
        "task": ("flag", "--task"),
        "lr": ("flag", "--set lr=…"),
        "overlong_buffer": ("flag", "algorithm dapo, --set algorithm=…"),
        "engine": ("implied", "by other settings"),
    }
    assert {name: origin[name] for name in expected} == expected
    assert (cfg.wandb_project, cfg.engine, cfg.lr) == ("from-the-shell", "vllm", 0.5)
    _, of_ei = config.explain("ei", preset="quick")
    assert of_ei["rounds"] == ("preset", "presets/quick.toml [ei]")
    _, of_chat = config.explain("sft", preset="tiny", flags={"task": "chat"})
    assert of_chat["batch_size"] == ("task", "presets/chat/tiny.toml [sft]")


def test_the_environment_is_stronger_than_files_and_weaker_than_flags(tmp_path, monkeypatch) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text("[common]\nwandb_project = 'of-the-file'\n")
    monkeypatch.setenv("WANDB_PROJECT", "of-the-shell")
    assert config.resolve("sft", config_file=recipe).wandb_project == "of-the-shell"
    assert config.resolve("sft", flags={"wandb_project": "typed"}).wandb_project == "typed"
    monkeypatch.setenv("WANDB_PROJECT", "")
    assert config.resolve("sft", config_file=recipe).wandb_project == "of-the-file"
    monkeypatch.setenv("WANDB_PROJECT", "a\udcffb")
    with pytest.raises(ConfigError, match="WANDB_PROJECT ="):
        config.resolve("sft")
