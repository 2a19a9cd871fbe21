"""The bound on requests shared by tenants, and the turn, whoever leaves when."""

from __future__ import annotations

import asyncio
from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import example, given

from common.json import JsonObject
from launch.gateway.admission import Admission, Client, Seat, tenant_of
from launch.gateway.errors import TooManyRequests
from tests.examples import examples


def test_a_tenant_is_the_first_thing_that_a_request_says_of_itself():
    salted: JsonObject = {"cache_salt": "secret", "user": "ann"}
    tenants = [
        tenant_of(salted, "Bearer key"),
        tenant_of({"user": "ann"}, "Bearer key"),
        tenant_of({"user": ""}, "Bearer key"),
        tenant_of({"user": "secret"}, None),
        tenant_of({}, None),
    ]
    assert len(set(tenants)) == 5 and tenants[-1] == ""
    assert tenants[0] == tenant_of({"cache_salt": ["", "secret"]}, None)
    assert not any(word in tenant for tenant in tenants for word in ("secret", "ann", "key"))


def test_where_there_are_keys_they_say_who_is_who():
    def client(body: JsonObject, tenant: str = "alice") -> Client:
        return Client.of(body, tenant, "Bearer key")

    claims: list[JsonObject] = [{}, {"user": "ann"}, {"cache_salt": "x"}, {"user": "bob"}]
    clients = [client(claim) for claim in claims]
    assert {(c.tenant, c.owner) for c in clients} == {("key:alice", "key:alice")}
    assert len({c.user for c in clients}) == 4 and clients[0].user == ""
    assert client({"user": "alice"}, "bob").tenant == "key:bob"
    assert client({}, "").tenant == tenant_of({}, "Bearer key") == client({}, "").owner


class Part:
    """One part of a request that takes its turn when it can and keeps it until told."""

    def __init__(self, admission: Admission, seat: Seat, cost_tokens: int = 1) -> None:
        self.seat = seat
        self.began = False
        self._admission = admission
        self._cost_tokens = cost_tokens
        self._finish = asyncio.Event()
        self.task = asyncio.create_task(self._run())
        self.task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        # Asked for: asyncio would log it when the task is collected, in the midst of whatever.
        if not task.cancelled():
            task.exception()
        self._admission.leave(self.seat)

    async def _run(self) -> None:
        async with self._admission.turn(self.seat, self._cost_tokens, 0):
            self.began = True
            await self._finish.wait()

    async def finish(self) -> None:
        self._finish.set()
        await asyncio.gather(self.task, return_exceptions=True)


async def parts_of(admission: Admission, tenant: str, count: int) -> list[Part]:
    parts = [Part(admission, admission.admit(tenant, 1)) for _ in range(count)]
    await asyncio.sleep(0)
    return parts


async def refused(part: Part) -> bool:
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return part.task.done() and isinstance(part.task.exception(), TooManyRequests)


async def test_one_part_has_the_turn_and_tenants_alternate():
    admission = Admission(10)
    heavy = await parts_of(admission, "heavy", 4)
    [light] = await parts_of(admission, "light", 1)
    assert [p.began for p in heavy] == [True, False, False, False] and not light.began
    await heavy[0].finish()
    await asyncio.sleep(0)
    assert light.began and not heavy[1].began
    assert (admission.admitted, admission.queued, admission.tenants_queued) == (4, 4, 1)


async def test_a_full_queue_takes_a_light_tenant_and_turns_away_the_heaviest():
    admission = Admission(4)
    heavy = await parts_of(admission, "heavy", 4)
    with pytest.raises(TooManyRequests):
        admission.admit("heavy", 1)
    [light] = await parts_of(admission, "light", 1)
    assert await refused(heavy[3]) and admission.displaced_total == 1
    assert admission.admitted == 4
    # Two and two: who comes now is told so, and nobody is pushed out and back again.
    await parts_of(admission, "light", 1)
    assert await refused(heavy[2])
    for tenant in ("light", "heavy"):
        with pytest.raises(TooManyRequests):
            admission.admit(tenant, 1)
    assert heavy[0].began and not heavy[0].task.done() and not heavy[1].task.done()
    assert not light.task.done()


async def test_who_is_refused_is_told_when_half_of_the_queue_will_be_gone():
    now_s = 100.0
    admission = Admission(13, clock=lambda: now_s)

    async def told() -> int:
        with pytest.raises(TooManyRequests) as refusal:
            admission.admit("a", 1)
        return refusal.value.retry_after_s

    parts = await parts_of(admission, "a", 13)
    assert await told() == 1  # nothing is known of the pace
    now_s += 4.0
    assert await told() == 26  # one turn in 4 s or less, and 13 that wait
    for part in parts[:3]:
        await part.finish()
        now_s += 0.5
    parts += await parts_of(admission, "a", 3)
    assert await told() == 12  # three turns in 5.5 s
    now_s += 1000
    assert await told() == 60
    for part in parts:
        await part.finish()
    for _ in range(13):
        seat = admission.admit("a", 1)
        async with admission.turn(seat, 1, 0):
            pass
    assert await told() == 1  # all run: the pace of an earlier queue says nothing


async def test_what_has_begun_is_not_displaced():
    admission = Admission(3)
    seats = [admission.admit("heavy", 1) for _ in range(3)]
    for seat in seats:
        async with admission.turn(seat, 1, 0):
            pass  # planned: it runs from here on
    [holder, repeated] = [Part(admission, seat) for seat in seats[:2]]  # their second attempts
    await asyncio.sleep(0)
    with pytest.raises(TooManyRequests):
        admission.admit("light", 1)
    assert holder.began and not repeated.task.done() and admission.displaced_total == 0


async def test_a_request_is_displaced_as_a_whole_or_not_at_all():
    admission = Admission(6)
    [first] = await parts_of(admission, "heavy", 1)
    seat = admission.admit("heavy", 3)
    triple = [Part(admission, seat) for _ in range(3)]
    running = admission.admit("heavy", 2)
    pair = [Part(admission, running)]  # the other part runs
    await asyncio.sleep(0)
    admission.admit("light", 1)
    assert [await refused(part) for part in triple] == [True] * 3
    assert not pair[0].task.done() and not first.task.done()
    assert admission.admitted == 4 and admission.displaced_total == 1


@pytest.mark.parametrize("ticks", [0, 1, 2])
async def test_a_turn_that_comes_to_one_who_leaves_goes_on(ticks):
    admission = Admission(10)
    first, second, third = await parts_of(admission, "a", 3)
    first._finish.set()
    for _ in range(ticks):  # 1: the second's turn has come, but it does not know yet
        await asyncio.sleep(0)
    second.task.cancel()
    await asyncio.gather(second.task, return_exceptions=True)
    await asyncio.sleep(0)
    assert third.began and not first.task.exception()
    await third.finish()
    assert (admission.admitted, admission.queued) == (0, 0)


steps = st.one_of(
    st.tuples(st.just("come"), st.sampled_from("abc"), st.integers(1, 3)),
    st.tuples(st.just("cancel"), st.integers(0, 50), st.booleans()),
    st.tuples(st.just("finish"), st.just(0), st.booleans()),
)


@examples()
@given(st.lists(steps, max_size=60))
def test_whoever_leaves_when_the_accounts_hold(steps):
    asyncio.run(_accounts_hold(steps))


async def _accounts_hold(steps) -> None:
    admission = Admission(8)
    parts: list[Part] = []
    for kind, which, more in steps:
        if kind == "come":
            try:
                seat = admission.admit(which, more)
            except TooManyRequests:
                assert admission.admitted + more > 8
                continue
            parts += [Part(admission, seat) for _ in range(more)]
        elif kind == "cancel" and parts:
            parts[which % len(parts)].task.cancel()
        else:
            for part in parts:
                if part.began:
                    part._finish.set()
        if kind == "come" or more:  # else the next step comes before anyone has noticed
            for _ in range(5):
                await asyncio.sleep(0)
            open_parts = [part for part in parts if not part.task.done()]
            assert admission.admitted == len(open_parts) == admission.queued <= 8
            assert sum(part.began for part in open_parts) == bool(open_parts)
        assert admission.admitted <= 8
    while left := [part for part in parts if not part.task.done()]:
        for part in left:
            part._finish.set()
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert (admission.admitted, admission.queued, admission.tenants_queued) == (0, 0, 0)


@examples(300)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 3)), max_size=40))
@example([("a", 1), ("a", 1), ("b", 2), ("b", 2), ("b", 1), ("c", 3)])
def test_who_is_refused_holds_as_much_as_anyone_who_waits(arrivals):
    asyncio.run(_refused_fairly(arrivals))


async def _refused_fairly(arrivals) -> None:
    admission = Admission(8)
    parts: list[Part] = []
    for tenant, count in arrivals:
        waiting = [part for part in parts if not part.task.done()]
        held = Counter(part.seat.tenant for part in waiting)
        try:
            seat = admission.admit(tenant, count)
        except TooManyRequests:
            # Nobody could have made room and still held what the newcomer then would.
            for other in {part.seat for part in waiting if part.seat.displaceable}:
                enough = admission.admitted - other.parts + count <= 8
                less = held[other.tenant] - other.parts < held[tenant] + count
                assert other.tenant == tenant or less or not enough
            continue
        parts += [Part(admission, seat) for _ in range(count)]
        for _ in range(3):
            await asyncio.sleep(0)
    open_parts = [part for part in parts if not part.task.done()]
    assert len(open_parts) == admission.admitted <= 8
    for part in parts:
        part.task.cancel()
    await asyncio.gather(*(part.task for part in parts), return_exceptions=True)
