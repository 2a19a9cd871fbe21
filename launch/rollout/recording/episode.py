"""A sample that an agent makes which owns its loop: a harness process, or code of this one, that is
given a URL, and the turns that were recorded there."""

from __future__ import annotations

import asyncio

import msgspec

from launch.rollout.episode import EnvFailed, Episode, Parts
from launch.rollout.input.rows import Prompt
from launch.rollout.output.schema import Branch, Sample, Segment, Turn, VersionSpan
from launch.rollout.recording.process import BadResult, Ended, Limits, run_harness
from launch.rollout.recording.recorder import Bounds, Recorder
from launch.rollout.recording.server import RecordingServer
from launch.rollout.recording.turns import RecordedTurn

_SAID_CHARS = 2000
"""Of a harness's output, in a sample's error."""


class HarnessEpisode(Episode):
    """Sample ``number`` of a row. Its trajectories are samples of their own: all but the first are
    the sample's ``branches``."""

    def __init__(
        self, parts: Parts, prompt: Prompt, number: int, begun: Sample | None = None
    ) -> None:
        super().__init__(parts, prompt, number, begun)
        assert parts.recording is not None
        self._server: RecordingServer = parts.recording
        self.sample.token_ids, self.sample.messages, self.sample.prompt_tokens = [], [], 0

    @property
    def is_resumable(self) -> bool:
        """An agent that was ended begins anew."""
        return False

    async def _turns(self) -> str:
        parts = self._parts
        bounds = Bounds(parts.config.max_turns, parts.config.max_episode_tokens)
        recorder = Recorder(
            bounds, self._server.client, parts.slots, self.sample.sampling, self._server.model
        )
        recorder.on_answer = lambda tokens, answer: parts.on_answer(tokens, answer, False)
        self._give_back()
        parts.slots.thinking += 1
        parts.slots.changed()
        key = self._server.open(recorder)
        try:
            return await self._harness(recorder, f"{self._server.url}/{key}")
        finally:
            self._server.close(key)
            await recorder.close()
            parts.slots.thinking -= 1
            parts.slots.changed()
            self._keep(recorder)

    async def _harness(self, recorder: Recorder, url: str) -> str:
        """Returns the finish reason; raises ``EnvFailed``, and ``EndpointGone``."""
        config, parts = self._parts.config, self._parts
        row = parts.fields_of(self._prompt.number, self._prompt.row)
        limits = Limits(config.harness_timeout_s, config.harness_output_bytes)
        running = asyncio.create_task(run_harness(config.harness, url, row, limits))
        recorder.gone.add_done_callback(lambda _: running.cancel())
        try:
            ended = await running
        except (OSError, BadResult) as error:
            raise EnvFailed(str(error)) from error
        except asyncio.CancelledError:
            if recorder.gone.done():
                raise recorder.gone.result() from None
            raise
        return self._finish(ended, recorder)

    def _finish(self, ended: Ended, recorder: Recorder) -> str:
        sample, config = self.sample, self._parts.config
        sample.exit_code, sample.reward = ended.exit_code, ended.reward
        if ended.is_late:
            raise EnvFailed(f"the harness took more than {config.harness_timeout_s:g} s")
        if recorder.limit:
            return recorder.limit
        if ended.exit_code:
            said = ended.output.strip()[-_SAID_CHARS:]
            raise EnvFailed(f"the harness ended with {ended.exit_code}: {said}")
        if not recorder.turns.count:
            raise EnvFailed(
                f"nothing was recorded: {recorder.unrecorded} answers came without their tokens"
                if recorder.unrecorded
                else "the harness asked for nothing at its URL"
            )
        return "done"

    def _keep(self, recorder: Recorder) -> None:
        """What was recorded: the first trajectory is the sample's own."""
        logprobs = self._parts.config.logprobs
        found = [branch_of(turns, logprobs) for turns in recorder.turns.trajectories]
        if found:
            for name, value in msgspec.structs.asdict(found[0]).items():
                setattr(self.sample, name, value)
        self.sample.branches = found[1:]


def branch_of(turns: list[RecordedTurn], logprobs: bool) -> Branch:
    """A trajectory: each turn begins with all tokens of the one before."""
    return Branch(
        messages=turns[-1].messages,
        token_ids=turns[-1].ids,
        logprobs=[p for turn in turns for p in turn.answer.logprobs] if logprobs else [],
        prompt_tokens=len(turns[0].prompt_ids),
        turns=[_turn(turn) for turn in turns],
        versions=[
            VersionSpan(span.version, begin + span.begin, begin + span.end)
            for turn in turns
            for begin in [len(turn.prompt_ids)]
            for span in turn.answer.versions
        ],
    )


def _turn(turn: RecordedTurn) -> Turn:
    answer, begin = turn.answer, len(turn.prompt_ids)
    end = begin + len(answer.token_ids)
    return Turn(
        begin=begin,
        end=end,
        prompt_tokens=begin,
        cached_tokens=answer.cached_tokens,
        finish_reason=answer.finish_reason,
        weight_version=answer.versions[0].version if answer.versions else "",
        attempts=answer.attempts,
        read_bytes=answer.read_bytes,
        request_s=answer.seconds,
        segments=[Segment(begin, end, answer.cached_tokens, answer.finish_reason)],
    )
