"""Numbers and names that travel between processes, as types that mypy tells apart; and a reason."""

from __future__ import annotations

from typing import Annotated, NewType

from msgspec import Meta

PlanId = NewType("PlanId", int)
"""Of a plan: given by the gateway, 48 bits, never reused."""
JobId = NewType("JobId", int)
"""Of an agent's job (``Deliver`` or ``PullBlocks``): given by the engine, 48 bits, never reused."""
Incarnation = NewType("Incarnation", int)
"""Start time of a process in ms: a greater one replaces all that came before it."""
BoardSlot = NewType("BoardSlot", int)
"""Of a word on an engine's completion board."""

PLAN_OUTDATED = "the weights were updated after this request was planned"
"""Why an engine has aborted a request: SGLang hands on a text alone, by which the gateway knows."""

PROMPT_IDS_HEADER = "x-dualpath-prompt-ids"
"""On a request to an engine: answer with the prompt's token ids alone."""
FIELDS_HEADER = "x-dualpath-fields"
"""On a request to an engine: JSON of fields for which the route's body has no place."""
INPUT_IDS_HEADER = "x-dualpath-input-ids"
"""On a request to an engine: the prompt is the body's ``input_ids``, whatever its messages say."""
RECORD_HEADER = "x-dualpath-record"
"""On a request to an engine: the answer brings a record of its tokens (``RECORD``)."""
RECORD = "turn_record"
"""The field of an answer, or the event of a stream, that has it."""
GAVE_UP_STATUS = 424
"""An engine's answer to a request with such fields that it gave up, for whatever reason."""

TraceParent = Annotated[str, Meta(pattern="^(00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2})?$")]
"""W3C's: of the span that an order belongs to; empty where there is none."""

NO_PLAN = PlanId(0)
FIRST_PLAN = PlanId(1)
NO_JOB = JobId(0)
NO_INCARNATION = Incarnation(0)
"""Plans, jobs and incarnations are numbered from 1."""
