"""The process of an engine: ``python -m engine.serve FLAGS`` is ``python -m sglang.launch_server
FLAGS``, a second sooner on a slow core.

What SGLang imports stays for good, a million objects. Python looks for garbage in all of it again
and again while it grows: a tenth of the time that imports take. So it does not here, and later on
passes over what is there by then.
"""

from __future__ import annotations

import atexit
import gc
import runpy
from importlib import import_module

PACKAGE = "sglang"
"""Which imports nearly all that there is. Nothing of it is used here."""


def main() -> None:
    """Serves until it is ended."""
    gc.disable()
    import_module(PACKAGE)
    gc.freeze()
    atexit.register(gc.unfreeze)  # else libraries would say that it has leaked
    gc.enable()
    # As by -m: processes that it spawns find the module by its name.
    runpy.run_module(f"{PACKAGE}.launch_server", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
