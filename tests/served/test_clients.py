"""Clients that are not ours, Anthropic's and OpenAI's own, on the routes that they use: each keeps
a conversation with tools of three turns, whose KV is found again."""

from __future__ import annotations

import random
from typing import Any

import anthropic
import openai

from tests.served.conftest import WITH_THE_CLUSTER

pytestmark = WITH_THE_CLUSTER

PAGE = 64
WORDS = "the of and water storage reader block network long time number people".split()
SCHEMA = {
    "type": "object",
    "properties": {"unit": {"enum": ["celsius", "kelvin"]}},
    "required": ["unit"],
    "additionalProperties": False,
}
DESCRIPTION = "The temperature of the water."
TOOLS: list[Any] = [{"name": "measure", "description": DESCRIPTION, "input_schema": SCHEMA}]


def words(count: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def anthropic_client(url: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)


def openai_client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def messages_turn(client: anthropic.Anthropic, messages: list[Any], stream: bool = False) -> Any:
    asked: dict[str, Any] = {
        "model": "tiny",
        "max_tokens": 40,
        "messages": messages,
        "tools": TOOLS,
        "extra_body": {"top_k": 1},
    }
    if not stream:
        return client.messages.create(**asked)
    with client.messages.stream(**asked) as streaming:
        return streaming.get_final_message()


def responses_turn(client: openai.OpenAI, items: list[Any], stream: bool = False) -> Any:
    tool = {"type": "function", "name": "measure", "description": DESCRIPTION, "parameters": SCHEMA}
    asked: dict[str, Any] = {
        "model": client.models.list().data[0].id,
        "input": items,
        "max_output_tokens": 40,
        "tools": [tool],
        "extra_body": {"top_k": 1},
    }
    if not stream:
        return client.responses.create(**asked)
    *_, last = client.responses.create(**asked, stream=True)
    return last.response  # "incomplete": a random model talks to the last token


def test_anthropics_client_uses_tools_over_three_turns(cluster):
    client = anthropic_client(cluster.url)
    messages: list[Any] = [{"role": "user", "content": words(300, seed=1)}]
    before = 0
    for turn in range(3):
        cluster.flush_engines()
        answer = messages_turn(client, messages)
        [said] = answer.content
        assert said.type == "text" and said.text
        cached = answer.usage.cache_read_input_tokens or 0
        assert cached >= before // PAGE * PAGE
        before = answer.usage.input_tokens + cached
        cluster.wait_stored()
        cluster.flush_engines()
        streamed = messages_turn(client, messages, stream=True)
        assert [block.text for block in streamed.content] == [said.text]
        assert streamed.usage.cache_read_input_tokens == (before - 1) // PAGE * PAGE
        counted = client.messages.count_tokens(model="tiny", messages=messages, tools=TOOLS)
        assert counted.input_tokens == before
        # A random model does not write a call in the words of its template.
        call = {"type": "tool_use", "id": f"call-{turn}", "name": "measure", "input": {}}
        text = {"type": "text", "text": said.text}
        result = {"type": "tool_result", "tool_use_id": f"call-{turn}", "content": words(80, turn)}
        messages += [
            {"role": "assistant", "content": [text, call]},
            {"role": "user", "content": [result]},
        ]


def test_openais_client_uses_tools_over_three_turns(cluster):
    client = openai_client(cluster.url)
    items: list[Any] = [{"role": "user", "content": words(300, seed=2)}]
    before = 0
    for turn in range(3):
        cluster.flush_engines()
        answer = responses_turn(client, items)
        assert answer.output_text and answer.error is None
        assert answer.id.startswith("resp_")
        assert answer.usage.input_tokens_details.cached_tokens >= before // PAGE * PAGE
        before = answer.usage.input_tokens
        cluster.wait_stored()
        cluster.flush_engines()
        streamed = responses_turn(client, items, stream=True)
        assert streamed.output_text == answer.output_text
        assert streamed.usage.input_tokens_details.cached_tokens == (before - 1) // PAGE * PAGE
        said = {"role": "assistant", "content": answer.output_text}
        call = {"type": "function_call", "call_id": f"call-{turn}", "name": "measure"}
        result = {"type": "function_call_output", "call_id": f"call-{turn}"}
        items += [said, call | {"arguments": "{}"}, result | {"output": words(80, seed=turn)}]
