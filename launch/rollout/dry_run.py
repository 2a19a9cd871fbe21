"""``--dry-run``: what a job would do, without generating anything."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console

from launch.models.resolve import resolve_model
from launch.rollout.client import Client
from launch.rollout.config import RolloutConfig
from launch.rollout.input.files import input_files
from launch.rollout.input.prompt_table import PromptTable, build_table
from launch.rollout.input.rows import BadRow, Row
from launch.rollout.output.schema import TAKEN_NAMES
from launch.rollout.token_ids import TokenIds

COUNTED_ROWS_MAX = 1000
"""Rows whose tokens are counted; of more rows, so many are taken evenly."""
BAD_SHOWN = 5


class LocalTokenizer:
    """The model's own tokenizer, where no cluster runs."""

    def __init__(self, model: str) -> None:
        from transformers import AutoTokenizer  # seconds to import

        self._tokenizer = AutoTokenizer.from_pretrained(resolve_model(model))

    async def tokenize(self, **fields: object) -> list[int]:
        """As ``/v1/tokenize``."""
        if (messages := fields.get("messages")) is not None:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            return list(self._tokenizer.encode(text, add_special_tokens=False))
        return list(self._tokenizer.encode(fields["prompt"]))

    async def detokenize(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids))

    async def close(self) -> None:
        pass


async def dry_run(config: RolloutConfig, console: Console) -> int:
    """Print counts and the first prompt; returns the exit code (3: there are bad rows)."""
    files = input_files(config.input_path)
    with tempfile.TemporaryDirectory(prefix="dualpath-rollout-") as folder:
        path = Path(folder) / "rows"
        await asyncio.to_thread(build_table, files, "", path, TAKEN_NAMES)
        table = PromptTable(path)
        good, bad = _sort_out(table)
        for number, reason in bad[:BAD_SHOWN]:
            console.print(f"row {number}: {reason}", style="red", markup=False)
        console.print(
            f"{table.rows:,} rows in {len(files)} files, {len(bad):,} of them bad; "
            f"{len(good):,} x {config.n} = {len(good) * config.n:,} samples"
        )
        if good:
            await _show_tokens(config, table, good, console)
    return 3 if bad else 0


def _sort_out(table: PromptTable) -> tuple[list[int], list[tuple[int, str]]]:
    good, bad = [], []
    for number in range(table.rows):
        try:
            table.row(number)
            good.append(number)
        except BadRow as error:
            bad.append((number, str(error)))
    return good, bad


async def _show_tokens(
    config: RolloutConfig, table: PromptTable, good: list[int], console: Console
) -> None:
    if config.endpoint:
        tokenizer: Client | LocalTokenizer = Client(
            config.endpoint, config.timeout_s, 10.0, config.access
        )
    else:
        tokenizer = LocalTokenizer(config.model)
    try:
        token_ids = TokenIds(tokenizer)
        step = -(-len(good) // COUNTED_ROWS_MAX)
        rows = [table.row(number) for number in good[::step]]
        counts = [len(await token_ids.prompt(row)) for row in rows]
        mean = float(np.mean(counts))
        prefix = "about " if step > 1 else ""
        console.print(
            f"prompts: {prefix}{mean * len(good):,.0f} tokens, {mean:,.0f} on average, "
            f"{'at least ' if step > 1 else ''}{max(counts):,} in the longest"
        )
        console.print(f"generated: at most {_generated_max(config, rows) * len(good):,.0f} tokens")
        console.print("first prompt:", style="bold")
        first = await token_ids.prompt(rows[0])
        console.print(await tokenizer.detokenize(first), markup=False, highlight=False)
    finally:
        await tokenizer.close()


def _generated_max(config: RolloutConfig, rows: list[Row]) -> float:
    """Of all samples of one row, on average."""
    turns = config.max_turns if config.env else 1
    limits = [row.max_new_tokens or config.max_new_tokens for row in rows]
    return float(np.mean(limits)) * turns * config.n
