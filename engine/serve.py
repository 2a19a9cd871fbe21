"""SGLang's server, sooner: ``python -m engine.serve`` is ``python -m sglang.launch_server``.

Its imports make objects by the million and drop hardly any. Python's garbage collector looks
for some to free all the while, which takes 2 of 8 s.
"""

from __future__ import annotations

import gc
import importlib
import runpy


def main() -> None:
    """Serve until a signal, as the command line says."""
    gc.disable()
    _import_in_sglangs_order()
    gc.freeze()  # nor need it look at these later, or in the processes that SGLang starts
    gc.enable()
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


def _import_in_sglangs_order() -> None:
    # What is imported before the plugins are loaded may keep functions that they replace.
    importlib.import_module("sglang.srt.server_args")
    importlib.import_module("sglang.srt.plugins").load_plugins()
    importlib.import_module("sglang.srt.entrypoints.http_server")


if __name__ == "__main__":
    main()
