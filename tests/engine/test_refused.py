"""What an engine refuses of SGLang's settings, however they came about."""

from types import SimpleNamespace

import pytest

from engine.config import EngineConfig
from engine.refused import refused_settings
from engine.sglang import startup


def settings(**changes):
    plain = {
        "enable_two_batch_overlap": False,
        "enable_pdmux": False,
        "speculative_algorithm": None,
        "enable_multi_layer_eagle": False,
        "optimistic_prefill_attempts": 0,
        "cuda_graph_config": SimpleNamespace(prefill=SimpleNamespace(backend="breakable")),
    }
    return SimpleNamespace(**(plain | changes))


@pytest.mark.parametrize("algorithm", [None, "EAGLE"])
def test_sglangs_defaults_are_served_and_drafts(algorithm):
    assert refused_settings(settings(speculative_algorithm=algorithm)) == ""


@pytest.mark.parametrize(
    "changes",
    [
        {"enable_two_batch_overlap": True},
        {"enable_pdmux": True},
        {"speculative_algorithm": "NGRAM"},
        {"speculative_algorithm": "EAGLE", "enable_multi_layer_eagle": True},
        {"optimistic_prefill_attempts": 1},
        {"cuda_graph_config": SimpleNamespace(prefill=SimpleNamespace(backend="full"))},
    ],
)
def test_what_breaks_an_engine_is_refused_with_its_flag(changes):
    reason = refused_settings(settings(**changes))
    assert reason.startswith("--") and "is not supported: " in reason


@pytest.mark.parametrize(
    ("device", "backend", "checksum", "match"),
    [
        ("cuda", "breakable", False, "--cuda-graph-backend-prefill disabled"),
        ("cpu", "breakable", True, "--disaggregation-enable-kv-checksum"),
        ("cpu", "breakable", False, None),
        ("cuda", "disabled", False, None),
    ],
)
def test_a_layer_window_is_refused_where_it_would_be_wrong(
    monkeypatch, device, backend, checksum, match
):
    monkeypatch.setattr(startup, "writes_are_ordered", lambda: True)
    config = EngineConfig(
        name="p0", role="prefill", controls=[], agent="a", agents={}, layer_window=2
    )
    args = settings(
        cuda_graph_config=SimpleNamespace(prefill=SimpleNamespace(backend=backend)),
        disaggregation_enable_kv_checksum=checksum,
    )
    if match is None:
        startup._check_device(config, args, device)
    else:
        with pytest.raises(NotImplementedError, match=match):
            startup._check_device(config, args, device)


@pytest.mark.parametrize(("protocol", "is_refused"), [("rdma", True), ("tcp", False)])
def test_a_gpu_whose_nic_writes_have_no_order_is_refused_over_rdma(
    monkeypatch, protocol, is_refused
):
    monkeypatch.setattr(startup, "writes_are_ordered", lambda: False)
    monkeypatch.setenv("MOONCAKE_PROTOCOL", protocol)
    config = EngineConfig(name="d0", role="decode", controls=[], agent="a", agents={})
    args = settings(disaggregation_enable_kv_checksum=False)
    if not is_refused:
        startup._check_device(config, args, "cuda")
    else:
        with pytest.raises(NotImplementedError, match="--transfer tcp"):
            startup._check_device(config, args, "cuda")
