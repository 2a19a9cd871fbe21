"""An agent that owns its loop, for tests, which starts fast: chats over HTTP, as its row says."""

import json
import os
import sys
import urllib.request
from pathlib import Path
from typing import Any


def ask(path: str, body: Any = None) -> Any:
    data = json.dumps(body).encode() if body is not None else None
    url = os.environ["ROLLOUT_BASE_URL"] + path
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def chat(asks: list[str], fork: str = "") -> None:
    messages: list[Any] = []
    for text in asks:
        messages.append({"role": "user", "content": text})
        answer = ask("/v1/chat/completions", {"messages": messages, "max_tokens": 99})
        messages.append(answer["choices"][0]["message"])
    if fork:
        other = [*messages[:2], {"role": "user", "content": fork}]
        ask("/v1/chat/completions", {"messages": other})


def main() -> int:
    row = json.loads(Path(os.environ["ROLLOUT_ROW"]).read_text())
    for conversation in row["conversations"]:
        chat(**conversation)
    print("some words")
    print(json.dumps({"reward": 0.5}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
