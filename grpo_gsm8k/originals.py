"""Flags under the names that this project's five forerunners gave them; docs/originals.md has all of it in tables.

`ALIASES` are other names of a flag, understood by every command that has the flag. `RENAMED` are flags that mean
something else here, or stand elsewhere, and `COMMANDS` are commands: whoever types one reads what to type instead.
"""

from __future__ import annotations

ALIASES = {
    # GRPO with Tinker
    "model-name": "model-id",
    "n-grpo-steps": "steps",
    "learning-rate": "lr",
    "use-std-normalization": "std-norm",
    "no-use-std-normalization": "no-std-norm",
    "cliprange": "clip-eps",
    "sampling-temperature": "temperature",
    "sampling-max-tokens": "max-new-tokens",
    "epochs-per-rollout-batch": "epochs",
    "log-path": "out-dir",
    "wandb-name": "run-name",
    # grpo-gsm8k
    "model-path": "model-id",
    # Podsmith
    "pod-name": "name",
    "cloud-type": "cloud",
    "hub-model-id": "repo-id",
    "gpu-count": "count",
    "gpu-type": "gpu",
    "container-disk-gb": "disk",
    "progress-url": "webhook",
    "reasoning-tag": "think-open",
    "reasoning-end-tag": "think-close",
    "answer-tag": "answer-open",
    "answer-end-tag": "answer-close",
    # the post-training pipeline
    "kl-penalty-coef": "kl-coef",
    "hf-repo-name": "repo-id",
    # grpo_server
    "num-completions-per-prompt": "group-size",
    "output-dir": "out-dir",
}


def _job(flag: str) -> str:
    return f"is {flag.split()[0]} here; a rented job takes it behind --: launch up … -- {flag}"


RENAMED = {
    # grpo-gsm8k
    "--gsm8k-k-shot": "is --shots here, and --shots_path names the file that they are drawn from",
    "--eval-suites": "has no use here: eval runs GSM8K or a --task; scripts/against_lm_eval.py runs lm-eval's suites",
    "--lm-eval-fewshot": "is --shots of scripts/against_lm_eval.py here",
    "--batch-size": "an evaluation has --sample_rows, and a step of grpo --rollouts_per_step",
    # GRPO with Tinker
    "--rollout-batch-size": "counted questions; --rollouts_per_step counts completions, so that 256 questions of 8 "
    "are --rollouts_per_step 2048 --group_size 8",
    "--train-batch-size": "is --minibatches here, the optimizer steps that a step's rollouts are split into",
    "--gradient-accumulation-steps": "has no use here: --max_tokens_per_microbatch bounds the memory of a forward pass",
    "--use-r1-zero-format": "is --prompt_style r1_zero here; for False, --prompt_style qwen_boxed",
    "--force-fresh-start": "has no use here: a run goes on with --resume alone; for a fresh one give another --out_dir",
    # Podsmith
    "--shard-model": "has no use here: torchrun shards a model over its GPUs, -- torchrun --nproc-per-node 4 -m "
    "grpo_gsm8k.cli grpo …",
    "--deepspeed-stage": "has no use here: torchrun shards weights and optimizer, -- torchrun --nproc-per-node 4 -m "
    "grpo_gsm8k.cli grpo …",
    "--attn-implementation": "has no use here: attention is torch's own, which needs no installation",
    "--transformers-version": "has no use here: the image has the version of uv.lock",
    "--transformers-from-git": "has no use here: the image has the version of uv.lock",
    "--chat-template": "has no use here: put chat_template.jinja into the model's folder and name that as --model_id",
    "--debug-remote": "has no use here: the job's whole log is shown; for a shell's, run -- bash -x SCRIPT",
    "--no-vllm": _job("--engine hf"),
    "--env-file": "has no use here: the file .env is read from the folder where you type",
    "--use-thinnka-image": "has no use here: the image is the latest release of the repository, or --image",
    "--vllm-mode": _job("--vllm_device cuda:1"),
    "--max-steps": _job("--max_steps 500"),
    "--num-generations": _job("--group_size 16"),
    "--max-completion-length": _job("--max_new_tokens 2048"),
    "--dataset-fraction": "has no use here: --max_steps behind -- ends a run early, and its order is a fixed shuffle",
    "--dataset-seed": _job("--seed 123"),
    "--dataset-name": _job("--data FOLDER"),
    "--volume-gb": "is --disk here, GB that go with the pod; --volume names a network volume by its id",
    # the post-training pipeline
    "--mode": "each stage is a command here: pipeline (all), sft, grpo (rl), validate, merge and push (deploy)",
    "--sft-checkpoint": "is --model_id here, the folder of a checkpoint",
    "--checkpoint": "is --model_id here, the folder of a checkpoint",
    "--groups-per-batch": "counted prompts; --rollouts_per_step counts completions, group_size of each prompt",
    "--num-epochs": "is --epochs here",
    "--num-steps": "is --steps here",
    "--num-substeps": "is --minibatches here, the optimizer steps that a step's rollouts are split into",
    "--max-tokens": "is --max_new_tokens here",
    "--loss-fn": "is --algorithm here: --algorithm importance_sampling, --algorithm ppo",
    "--reward-type": "is --preference here: --task chat --preference length",
    "--target-length": "is --length_words here: --task chat --preference length --length_words 150",
    "--reward-model": "is --judge_model here: --task chat --preference judge",
    "--lora-dropout": "has no use here: dropout is off in every pass",
    "--train-on-what": "is --train_on here: all, or last",
    "--dataset-type": "has no use here: --data_path hf:OWNER/NAME names a data set of the hub",
    "--upload-to-hf": "is a command here: grpo-gsm8k push CHECKPOINT --repo_id OWNER/NAME",
    # grpo_server
    "--api-key": "is --api_key_env here, the name of a variable that holds the key: other users see a command line",
}
COMMANDS = {
    "unified-eval": "eval",
    "gsm8k-eval": "eval",
    "rl": "grpo",
    "deploy": "export",
    "data-prep": "data",
    "fast-eval-vllm": "eval",
    "r1-traces": "traces",
}
"""Commands and modules of other names → the command here."""


def name_here(token: str) -> str:
    """A flag as this command line spells it: `-` for `_`, and its name here for another one's."""
    token = token.replace("_", "-")
    return ALIASES.get(token, token)
