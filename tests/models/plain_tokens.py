"""Greedy tokens of models by SGLang's model code and pools on a CPU, without servers: prompts in
two chunks, then token by token. A process for each model, since SGLang's settings are global.

``python -m tests.models.plain_tokens``: models and prompts, as JSON, on standard input; their
answers, likewise, on the last line of standard output.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from array import array
from pathlib import Path

from launch.cluster.layout import PAGE_TOKENS
from launch.cluster.tensor_parallel import cpu_env

NEW_TOKENS = 16


def plain_tokens(folders: list[Path], prompts: list[list[int]]) -> list[list[list[int]]]:
    """Of each model the answer to each prompt; all of them have layers of one kind."""
    environment = os.environ | cpu_env([], folders[0])
    environment |= {"SGLANG_PLATFORM": "dualpath_cpu", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    asked = json.dumps([[str(folder) for folder in folders], prompts])
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=asked,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        timeout=500,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def generate(folder: str, prompts: list[list[int]]) -> list[list[int]]:
    """Of one model; once in a process."""
    from sglang.benchmark import one_batch
    from sglang.srt.server_args import PortArgs, ServerArgs

    args = ServerArgs(
        model_path=folder,
        device="cpu",
        dtype="float32",
        page_size=PAGE_TOKENS,
        max_total_tokens=8192,
        max_mamba_cache_size=16,
    )
    args.resolve_once()
    rank = one_batch.spawn_world_rank(args, tp_rank=0, pp_rank=0)
    one_batch.publish(args, role="scheduler", ranks=one_batch.SpawnRanks(world_rank=rank, gpu_id=0))
    one_batch._init_process_global_configs()
    runner, _ = one_batch.load_model(args, PortArgs.init_new(args), 0, 0)
    return [_answer(runner, number, ids) for number, ids in enumerate(prompts)]


def _answer(runner, number, ids):
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_params import SamplingParams

    request = Req(
        rid=number,
        origin_input_text="",
        origin_input_ids=array("q", ids),
        sampling_params=SamplingParams(temperature=0, max_new_tokens=NEW_TOKENS),
    )
    request.full_untruncated_fill_ids = request.origin_input_ids
    request.logprob_start_len = -1
    request.extend_end = PAGE_TOKENS
    runner.extend([request])
    request.prefix_len, request.extend_end = PAGE_TOKENS, len(ids)
    token, _, batch = runner.extend([request])
    answer = [int(token[0])]
    while len(answer) < NEW_TOKENS:
        token, _ = runner.decode(token, batch)
        answer.append(int(token[0]))
    runner.cleanup(batch)
    return answer


def main() -> None:
    folders, prompts = json.load(sys.stdin)
    from sglang.srt.plugins import load_plugins

    load_plugins()
    import sglang.benchmark.one_batch  # noqa: F401  imported once, for all of the processes

    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as processes:
        answers = processes.starmap(generate, [(each, prompts) for each in folders], chunksize=1)
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
