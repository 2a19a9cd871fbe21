"""An agent that owns its loop, for tests: conversations of tools by OpenAI's and Anthropic's own
clients, one after the other, as its row says."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import anthropic
import openai

SCHEMA: dict[str, Any] = {"type": "object", "properties": {"unit": {"type": "string"}}}


def chat(asks: list[str], stream: bool) -> None:
    client = openai.OpenAI(max_retries=0)
    function = {"name": "measure", "parameters": SCHEMA}
    tools: Any = [{"type": "function", "function": function}]
    messages: Any = [{"role": "system", "content": "Be brief."}]
    for ask in asks:
        if messages[-1].get("tool_calls"):
            call = messages[-1]["tool_calls"][0]
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": ask})
        else:
            messages.append({"role": "user", "content": ask})
        asked: Any = {"model": "any", "messages": messages, "tools": tools}
        if stream:
            said: Any = streamed(client, asked).choices[0].message
        else:
            said = client.chat.completions.create(**asked).choices[0].message
        messages.append(said.model_dump(exclude_none=True, exclude={"parsed"}))


def streamed(client: openai.OpenAI, asked: Any) -> Any:
    with client.chat.completions.stream(**asked) as streaming:
        try:
            return streaming.get_final_completion()
        except openai.LengthFinishReasonError as cut:  # which is none to an agent
            return cut.completion


def messages(asks: list[str], stream: bool) -> None:
    client = anthropic.Anthropic(max_retries=0)
    tools: Any = [{"name": "measure", "input_schema": SCHEMA}]
    said: list[Any] = []
    for ask in asks:
        # Caches are marked anew at each turn.
        text: dict[str, Any] = {"type": "text", "text": ask}
        content = [text | {"cache_control": {"type": "ephemeral"}}]
        last = said[-1]["content"] if said else []
        calls = [block for block in last if block["type"] == "tool_use"]
        if calls:
            content = [{"type": "tool_result", "tool_use_id": calls[0]["id"], "content": ask}]
        for message in said:
            for block in message["content"]:
                block.pop("cache_control", None)
        said.append({"role": "user", "content": content})
        asked: Any = {"model": "any", "max_tokens": 99, "messages": said, "tools": tools}
        if stream:
            with client.messages.stream(**asked) as streaming:
                answer: Any = streaming.get_final_message()
        else:
            answer = client.messages.create(**asked)
        blocks = [block.model_dump(exclude_none=True) for block in answer.content]
        said.append({"role": "assistant", "content": blocks})


def responses(asks: list[str], stream: bool) -> None:
    client = openai.OpenAI(max_retries=0)
    tools: Any = [{"type": "function", "name": "measure", "parameters": SCHEMA, "strict": False}]
    items: list[Any] = []
    for ask in asks:
        if items and items[-1]["type"] == "function_call":
            called = {"type": "function_call_output", "call_id": items[-1]["call_id"]}
            items.append(called | {"output": ask})
        else:
            items.append({"type": "message", "role": "user", "content": ask})
        asked: Any = {"model": "any", "input": items, "tools": tools}
        if stream:
            *_, last = client.responses.create(**asked, stream=True)
            answer: Any = last.response
        else:
            answer = client.responses.create(**asked)
        items += [item.model_dump(exclude_none=True) for item in answer.output]


ROUTES = {"chat": chat, "messages": messages, "responses": responses}


def main() -> int:
    row = json.loads(Path(os.environ["ROLLOUT_ROW"]).read_text())
    for conversation in row["conversations"]:
        ROUTES[conversation.pop("route")](**conversation)
    Path(os.environ["ROLLOUT_RESULT"]).write_text(json.dumps({"reward": 1}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
