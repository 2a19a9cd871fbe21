"""What a store holds of its users' prompts is not for other users of the machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from storage.ssd.tier import SsdTier
from tests.storage.conftest import key_of, no_wake, write


@pytest.fixture(autouse=True)
def usual_umask() -> Iterator[None]:
    mask = os.umask(0o022)
    yield
    os.umask(mask)


def is_private(path: Path) -> bool:
    return path.stat().st_mode & 0o077 == 0


def test_a_store_that_others_could_read_is_closed_to_them(
    tmp_path: Path, closing: Callable[[SsdTier], SsdTier]
) -> None:
    folder = tmp_path / "ssd"
    tier = closing(SsdTier(folder, 1 << 20, no_wake, threads=2))
    write(tier, key_of(1))
    slabs = list(folder.glob("*.slab"))
    assert slabs and all(map(is_private, [folder, *slabs]))
    tier.close()
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755)
    closing(SsdTier(folder, 1 << 20, no_wake, threads=2))
    assert all(map(is_private, [folder, *folder.iterdir()]))


def test_a_folder_of_somebody_elses_keeps_its_mode(
    tmp_path: Path, closing: Callable[[SsdTier], SsdTier]
) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "theirs").touch()
    closing(SsdTier(tmp_path, 1 << 20, no_wake, threads=2))
    assert not is_private(tmp_path) and not is_private(tmp_path / "theirs")
