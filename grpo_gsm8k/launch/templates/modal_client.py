"""Chat with a deployed model, its answer streamed. Standard library only.

Written by `grpo-gsm8k export`. The key comes from VLLM_API_KEY; Modal's proxy token, where the app wants one, from
MODAL_KEY and MODAL_SECRET.

    python modal_client.py URL "What is 12 * 7?"      # one question
    python modal_client.py URL                        # a conversation; an empty line ends it
    python modal_client.py URL --health               # is the model loaded? Exit code 0 or 1
    python modal_client.py URL --raw "2 + 2 ="        # the text as it is, without the chat template
"""

import argparse
import http.client
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# ---- settings
NAME = "grpo-model"  # the model in requests
# ---- end of settings

START_S = 1200  # a GPU that was given back is rented anew and loads the model


def headers() -> dict[str, str]:
    """The credentials, from the environment and nowhere else."""
    sent = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('VLLM_API_KEY', '')}"}
    if token := os.environ.get("MODAL_KEY"):
        sent |= {"Modal-Key": token, "Modal-Secret": os.environ.get("MODAL_SECRET", "")}
    return sent


def stream(url: str, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The events of a streamed answer. Raises `SystemExit` with one line where the server refuses."""
    data = json.dumps({"model": NAME, "stream": True, **body}).encode()
    request = urllib.request.Request(url.rstrip("/") + path, data, headers())
    try:
        with urllib.request.urlopen(request, timeout=START_S) as answer:
            for line in answer:
                event = line.decode().removeprefix("data:").strip()
                if event == "[DONE]":
                    return
                if event:
                    found = json.loads(event)
                    if "error" in found:  # in the middle of an answer
                        raise SystemExit(f"{url}: {found['error'].get('message', found['error'])}")
                    yield found
    except urllib.error.HTTPError as fault:
        raise SystemExit(
            f"{url}: {fault.code}: {' '.join(fault.read().decode(errors='replace').split())[:300]}"
        ) from None
    except (OSError, http.client.HTTPException) as fault:  # refused, or cut off in the middle
        raise SystemExit(f"{url}: {fault or type(fault).__name__}") from None
    raise SystemExit(f"{url}: the answer ended before it was complete")


def chat(messages: Sequence[Mapping[str, str]], url: str, **settings: Any) -> Iterator[str]:
    """The assistant's answer to a conversation, piece by piece; `settings` are OpenAI's: max_tokens, temperature, …"""
    for event in stream(url, "/v1/chat/completions", {"messages": messages, **settings}):
        for choice in event["choices"]:
            if piece := choice["delta"].get("content"):
                yield piece


def chat_with_model(messages: Sequence[Mapping[str, str]], url: str, **settings: Any) -> str:
    """The assistant's answer to a conversation, whole."""
    return "".join(chat(messages, url, **settings))


def complete(prompt: str, url: str, **settings: Any) -> Iterator[str]:
    """What the model writes behind a text, piece by piece."""
    for event in stream(url, "/v1/completions", {"prompt": prompt, **settings}):
        yield from (choice["text"] for choice in event["choices"])


def healthy(url: str) -> bool:
    """Whether the server answers that its model is loaded."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url.rstrip("/") + "/health", headers=headers()), timeout=60):
            return True
    except (OSError, http.client.HTTPException):
        return False


def show(pieces: Iterator[str]) -> str:
    """Print an answer while it comes; return it."""
    said = []
    for piece in pieces:
        print(piece, end="", flush=True)
        said.append(piece)
    print()
    return "".join(said)


def main() -> None:
    parser = argparse.ArgumentParser(description="Chat with a deployed model.")
    parser.add_argument("url")
    parser.add_argument("question", nargs="?", default="")
    parser.add_argument("--raw", action="store_true", help="complete the text as it is")
    parser.add_argument("--health", action="store_true")
    parser.add_argument("--max_tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.7)
    args = parser.parse_args()
    if args.health:
        sys.exit(0 if healthy(args.url) else 1)
    settings = {"max_tokens": args.max_tokens, "temperature": args.temperature}
    if args.raw:
        show(complete(args.question, args.url, **settings))
        return
    messages: list[dict[str, str]] = []
    while question := args.question or input("> ").strip():
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": show(chat(messages, args.url, **settings))})
        if args.question:
            return


if __name__ == "__main__":
    try:
        main()
    except (EOFError, KeyboardInterrupt):
        print()
