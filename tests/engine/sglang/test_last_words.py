"""What an engine that ends itself was at work on is found in the exception's own frames."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest

from engine.sglang import last_words
from engine.sglang.last_words import LOCALS, USES, at_work
from tests.engine.sglang.installed import function


def _places():
    names = [use.name for use in USES]
    return {name: next(n for n in names if n.endswith(f".{name}")) for name in LOCALS}


@pytest.mark.parametrize("name", LOCALS)
def test_sglang_names_its_work_so(name):
    code = inspect.unwrap(function(_places()[name])).__code__
    assert code.co_name == name and LOCALS[name] in code.co_varnames


class Scheduler(SimpleNamespace):
    """With SGLang's own names of functions and locals."""

    enable_overlap = False
    last_batch = None

    def process_input_requests(self, recv_reqs):
        for recv_req in recv_reqs:
            self.fail(recv_req)

    def run_batch(self, batch):
        self.fail(batch)

    def run(self, batch):
        self.fail(batch)

    def fail(self, work):
        raise ValueError("no")


def batch(*rids):
    return SimpleNamespace(reqs=[SimpleNamespace(rid=rid) for rid in rids])


def named(scheduler, call, *args):
    with pytest.raises(ValueError) as raised:
        call(*args)
    return at_work(scheduler, raised.value)


def test_a_batch_or_the_request_that_comes_in_is_named(monkeypatch):
    monkeypatch.setattr(last_words, "TokenizedGenerateReqInput", SimpleNamespace)
    scheduler = Scheduler()
    requests = [SimpleNamespace(rid="a"), SimpleNamespace(rid="b")]
    assert named(scheduler, scheduler.process_input_requests, requests) == ["a"]
    assert named(scheduler, scheduler.process_input_requests, [object()]) == []
    assert named(scheduler, scheduler.run, batch("a")) == []
    monkeypatch.setattr(last_words, "TokenizedGenerateReqInput", int)
    assert named(scheduler, scheduler.run_batch, batch("a", "b")) == ["a", "b"]
    # On a GPU the error of one batch may be raised while the next is launched.
    overlapping = Scheduler(enable_overlap=True, last_batch=batch("b", "c"))
    assert named(overlapping, overlapping.run_batch, batch("a", "b")) == ["a", "b", "c"]


def test_the_error_goes_on_its_way_once_the_words_are_said(monkeypatch):
    said = []
    engine = SimpleNamespace(say_last=lambda rids, reason: said.append((rids, reason)))
    monkeypatch.setattr(last_words, "runtime_if_up", lambda: engine)
    scheduler = Scheduler()
    with pytest.raises(ValueError):
        last_words.around_event_loop(lambda s: s.run_batch(batch("a")), scheduler)
    assert said == [(["a"], "ValueError('no')")]
    assert last_words.around_event_loop(lambda s: "ended", scheduler) == "ended"
