"""Rewards over HTTP: prompts in, completions out, rewards in whenever they come; the server takes the steps.

    facade.py       a run: its groups of rollouts, what is refused, and the update when a batch is full
    router.py       /v1/start /v1/stop /v1/status /v1/rollouts /v1/rewards /v1/model
    grpo_server.py  the six routes of grpo_server's own client, over the same run

Token ids and log-probabilities stay here under a rollout's id, so what is trained is what was sampled. Everything that
is acknowledged is in the journal first: after a crash the run goes on where it was.
"""
