"""Further families with recurrent layers compute as transformers do. Without clusters, which know
nothing of families: only what their layers compute differs."""

from __future__ import annotations

import pytest

from tests.cluster import prompt
from tests.models.by_transformers import greedy
from tests.models.plain_tokens import plain_tokens
from tests.models.recurrent_models import FAMILIES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_tokens_are_those_of_transformers(tmp_path):
    folders = [tmp_path / name for name in FAMILIES]
    for folder in folders:
        folder.mkdir()
        FAMILIES[folder.name](folder)
    prompts = [prompt(length, length) for length in (65, 300)]
    answers = plain_tokens(folders, prompts)
    for folder, answered in zip(folders, answers, strict=True):
        assert answered == [greedy(folder, ids) for ids in prompts], folder.name
