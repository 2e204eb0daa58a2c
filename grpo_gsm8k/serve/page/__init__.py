"""Watching the service: a page at `/`, its figures as JSON, and the same for Prometheus at `/metrics`.

The page is three plain files of this folder. It holds no data: it asks for the key and sends it along.
"""

from grpo_gsm8k.serve.page.router import router

__all__ = ["router"]
