"""Address maths: where a layer's blocks are, joined and cut."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from common.block import BlockLayout
from tests.examples import examples
from transfer.ranges import cut_ranges, layer_ranges


def some_layout(data, sizes):
    """Layers that are all alike, or some that lack a component."""
    layers = data.draw(st.integers(1, 4))
    lacking = st.sets(st.integers(1, layers - 1)) if layers > 1 else st.just(set())
    absent = ((), *(tuple(sorted(data.draw(lacking))) for _ in sizes[1:]))
    return BlockLayout(4, layers, sizes, absent=absent if any(absent) else ())


@examples(150)
@given(st.data())
def test_ranges_move_each_layer_block_to_its_page(data):
    sizes = tuple(data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=3)))
    layout = some_layout(data, sizes)
    pages_total = 12
    pages = data.draw(st.permutations(range(pages_total)))[: data.draw(st.integers(0, 12))]
    slot_bytes = layout.block_bytes + data.draw(st.sampled_from([0, 7]))
    slots = data.draw(st.permutations(range(pages_total)))[: len(pages)]
    gap = data.draw(st.sampled_from([0, 5]))
    host = np.random.default_rng(0).integers(0, 256, pages_total * slot_bytes, np.uint8)
    bases, end = [], 0
    for _ in range(layout.num_layers):
        bases.append([end := end + gap])
        end += pages_total * sizes[0]
        for size in sizes[1:]:
            bases[-1].append(end)
            end += pages_total * size
    device = np.zeros(end, np.uint8)
    expected = device.copy()
    at_once = data.draw(st.integers(1, layout.num_layers))
    for first in range(0, layout.num_layers, at_once):
        layers = range(first, min(first + at_once, layout.num_layers))
        local, remote, lengths = layer_ranges(
            layout,
            np.array(bases),
            layers,
            np.array(slots, np.int64) * slot_bytes,
            np.array(pages, np.int64),
        )
        layer_bytes = layout.layer_start(layers.stop) - layout.layer_start(first)
        assert lengths.sum() == len(pages) * layer_bytes
        for source, target, length in zip(local, remote, lengths, strict=True):
            device[target : target + length] = host[source : source + length]
    for slot, page in zip(slots, pages, strict=True):
        offset = slot * slot_bytes
        for layer in range(layout.num_layers):
            for base, size in zip(bases[layer], layout.sizes(layer), strict=True):
                target = base + page * size
                expected[target : target + size] = host[offset : offset + size]
                offset += size
    assert np.array_equal(device, expected)


def test_neighbours_on_both_sides_are_one_range():
    latent = BlockLayout(4, 1, (64,))
    addresses = np.array([[1000]])
    slots, pages = np.array([0, 64, 128, 640]), np.array([3, 4, 6, 7])
    local, remote, lengths = layer_ranges(latent, addresses, range(1), slots, pages)
    assert local.tolist() == [0, 128, 640]
    assert remote.tolist() == [1192, 1384, 1448]
    assert lengths.tolist() == [128, 64, 64]


@given(st.lists(st.integers(0, 50), max_size=20), st.integers(1, 20))
def test_cut_ranges_are_the_same_bytes_in_small_parts(sizes, bytes_max):
    lengths = np.array(sizes, np.int64)
    local = np.cumsum(lengths) + 1000
    remote = -local
    parts = cut_ranges(local, remote, lengths, bytes_max)
    assert all(0 < length <= bytes_max for length in parts[2])
    moved = [(a + n, b + n) for a, b, length in zip(*parts, strict=True) for n in range(length)]
    ranges = zip(local, remote, lengths, strict=True)
    assert moved == [(a + n, b + n) for a, b, length in ranges for n in range(length)]
