"""Flags under the names that this project's five forerunners gave them; docs/originals.md has all of it in tables.

`ALIASES` are other names of a flag, understood by every command that has the flag. `RENAMED` are flags that mean
something else here, or stand elsewhere: whoever types one is told what to type instead.
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
    # Podsmith
    "gpu-count": "count",
    "gpu-type": "gpu",
    "container-disk-gb": "disk",
    "progress-url": "webhook",
    "reasoning-tag": "think-open",
    "reasoning-end-tag": "think-close",
    "answer-tag": "answer-open",
    "answer-end-tag": "answer-close",
}

_JOB = "give it to the job, behind --: launch up … -- "
RENAMED = {
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
    "--no-vllm": _JOB + "--engine hf",
    "--vllm-mode": _JOB + "--vllm_device cuda:1",
    "--max-steps": _JOB + "--max_steps 500",
    "--num-generations": _JOB + "--group_size 16",
    "--max-completion-length": _JOB + "--max_new_tokens 2048",
    "--dataset-fraction": "has no use here: --max_steps behind -- ends a run early, and its order is a fixed shuffle",
    "--dataset-seed": _JOB + "--seed 123",
    "--dataset-name": _JOB + "--data FOLDER",
    "--volume-gb": "is --disk here, GB that go with the pod; --volume names a network volume by its id",
    # the post-training pipeline
    "--mode": "each stage is a command here: pipeline (all), sft, grpo (rl), validate, merge and push (deploy)",
    "--sft-checkpoint": "is --model_id here, the folder of a checkpoint",
    "--checkpoint": "is --model_id here, the folder of a checkpoint",
    "--groups-per-batch": "counted prompts; --rollouts_per_step counts completions, group_size of each prompt",
    "--num-epochs": "is --epochs here",
    "--num-steps": "is --steps here",
}


def name_here(token: str) -> str:
    """A flag as this command line spells it: `-` for `_`, and its name here for another one's."""
    token = token.replace("_", "-")
    return ALIASES.get(token, token)
