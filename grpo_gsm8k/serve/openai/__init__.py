"""OpenAI's wire: models, completions and chat completions, as the openai package, lm-eval, TRL and vLLM's clients ask.

    router.py    the routes, under /v1 and under /oai/api/v1 (where Tinker's cloud has them)
    schema.py    requests: fields, ranges, and what is understood but not served
    answers.py   choices, log-probabilities, events
    stream.py    results whole, or told while they are drawn

Every request becomes jobs of the service's core, so it is journalled, batched with other clients' and answered the same
after a crash. Errors have OpenAI's form: {error: {message, type, param, code}}.
"""

from grpo_gsm8k.serve.openai.router import router

__all__ = ["router"]
