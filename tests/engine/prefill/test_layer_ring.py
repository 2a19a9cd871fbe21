"""A buffer of the layer window is given to its next layer only when it is free."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.prefill.layer_ring import LayerRing, RingStuck

SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 6)).filter(lambda s: s[1] <= s[0])


@given(SHAPES, st.randoms(use_true_random=False))
def test_no_position_is_free_before_the_last_user_of_its_buffer_is_finished(shape, random):
    layers, window = shape
    ring = LayerRing(layers, window)
    user = dict.fromkeys(range(window))  # buffer -> unfinished position
    unfinished: list[int] = []
    taken = 0
    for _ in range(6 * layers):
        while taken < ring.free_until:
            buffer = taken % layers % window
            assert user[buffer] is None, "given out twice"
            user[buffer] = taken
            unfinished.append(taken)
            taken += 1
        # Sends of several layers may end in any order.
        position = unfinished.pop(random.randrange(len(unfinished)))
        user[position % layers % window] = None
        ring.finish(position)
        assert len(ring._finished) <= 2 * layers


@given(SHAPES)
def test_layers_that_finish_in_order_never_stop(shape):
    layers, window = shape
    ring = LayerRing(layers, window)
    for position in range(5 * layers):
        ring.wait_free(position, timeout_s=0.0 if ring.free_until > position else 0.1)
        ring.finish(position)


def test_a_wait_ends_with_the_buffer_or_with_an_error():
    ring = LayerRing(4, 2)
    threading.Timer(0.02, ring.finish, (0,)).start()
    ring.wait_free(2, timeout_s=5)
    with pytest.raises(RingStuck, match="position 3"):
        ring.wait_free(3, timeout_s=0.01)
