"""A draft on a CPU: what of a chain of tokens is kept."""

import pytest
import torch

from engine.sglang.cpu.speculative import build_chain, verify_chain


def chain(seq_lens, verified, topk=1):
    positions = torch.zeros(len(seq_lens) * verified, dtype=torch.int64)
    links = torch.zeros(3, len(seq_lens), verified, dtype=torch.int64)
    no, lens = torch.empty(0), torch.tensor(seq_lens)
    index, token, sibling = links
    build_chain(no, no, lens, no, positions, index, token, sibling, topk, 1, verified, None)
    return positions.tolist(), links.tolist()


def test_tokens_follow_each_other_in_each_request():
    positions, (index, next_token, sibling) = chain([10, 20], 3)
    assert positions == [10, 11, 12, 20, 21, 22]
    assert index == [[0, 1, 2], [3, 4, 5]]
    assert next_token == [[1, 2, -1]] * 2 and sibling == [[-1, -1, -1]] * 2


def test_a_tree_is_refused():
    with pytest.raises(NotImplementedError, match="--speculative-eagle-topk"):
        chain([10], 3, topk=2)


def test_a_draft_is_followed_as_far_as_it_is_right():
    predicts = torch.zeros(9, dtype=torch.int32)
    accept_index, count = torch.full((3, 3), -1), torch.zeros(3, dtype=torch.int32)
    candidates = torch.tensor([[1, 2, 3], [1, 2, 3], [1, 9, 3]])
    chosen = torch.tensor([[2, 3, 4], [2, 8, 4], [2, 3, 4]])
    verify_chain(predicts, accept_index, count, candidates, chosen, topk=1)
    assert count.tolist() == [2, 1, 0]
    assert accept_index.tolist() == [[0, 1, 2], [3, 4, -1], [6, -1, -1]]
    assert predicts.tolist() == [2, 3, 4, 2, 8, 0, 2, 0, 0]
