"""What an engine refuses of SGLang's settings, however they came about."""

from types import SimpleNamespace

import pytest

from engine.refused import refused_settings


def settings(**changes):
    plain = {
        "enable_two_batch_overlap": False,
        "enable_pdmux": False,
        "speculative_algorithm": None,
        "optimistic_prefill_attempts": 0,
        "cuda_graph_config": SimpleNamespace(prefill=SimpleNamespace(backend="breakable")),
    }
    return SimpleNamespace(**(plain | changes))


def test_sglangs_defaults_are_served():
    assert refused_settings(settings()) == ""


@pytest.mark.parametrize(
    "changes",
    [
        {"enable_two_batch_overlap": True},
        {"enable_pdmux": True},
        {"speculative_algorithm": "EAGLE"},
        {"optimistic_prefill_attempts": 1},
        {"cuda_graph_config": SimpleNamespace(prefill=SimpleNamespace(backend="full"))},
    ],
)
def test_what_breaks_an_engine_is_refused_with_its_flag(changes):
    reason = refused_settings(settings(**changes))
    assert reason.startswith("--") and "is not supported: " in reason
