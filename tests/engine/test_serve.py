"""``python -m engine.serve`` is what it stands for, but for garbage that is not looked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SERVER = """
import gc, multiprocessing, sys

def say(how):
    print(how, gc.isenabled(), sys.argv[1:], flush=True)

if __name__ == "__main__":
    say("main")
    for how in ("fork", "spawn"):
        process = multiprocessing.get_context(how).Process(target=say, args=(how,))
        process.start()
        process.join()
    print(gc.get_freeze_count() > 0)
"""


def test_processes_of_an_engine_find_what_they_run_and_collect_garbage(tmp_path: Path) -> None:
    package = tmp_path / "sglang"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "launch_server.py").write_text(SERVER)
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    said = [
        subprocess.run(
            [sys.executable, "-m", module, "--port", "1"],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout.splitlines()
        for module in ("engine.serve", "sglang.launch_server")
    ]
    lines = [f"{how} True ['--port', '1']" for how in ("main", "fork", "spawn")]
    assert said == [[*lines, "True"], [*lines, "False"]]
