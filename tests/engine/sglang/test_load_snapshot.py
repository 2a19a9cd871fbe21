"""What SGLang keeps of an engine's load in ``/dev/shm``."""

from __future__ import annotations

import os
from pathlib import Path

from sglang.srt.managers.load_snapshot import shm_path_for

from common.process_settings import RUN_FOLDER, shared_memory_of
from engine.sglang.startup import after_shm_path_for


def test_its_name_is_noted_before_it_is_made(monkeypatch, tmp_path):
    monkeypatch.setenv(RUN_FOLDER, str(tmp_path))
    path = Path(shm_path_for("0123456789ab"))
    after_shm_path_for(str(path), "0123456789ab")
    assert path.parent == Path("/dev/shm") and not path.exists()
    noted = shared_memory_of(os.getsid(0), str(tmp_path))
    assert noted.read_text() == f"{path.name}\n" and noted.stat().st_mode & 0o077 == 0
