"""Has one agent end as by kill -9 in the middle of a delivery, once for each time that the file
named by ``DUALPATH_BENCHMARK_CRASH`` is there. On ``PYTHONPATH``, each process of Python has it."""

import os
import signal
import sys

if "transfer.agent" in sys.orig_argv:
    from transfer.agent.jobs.layers import LayerMover
    from transfer.agent.jobs.transfer import Transfer

    _move = LayerMover.move

    def _move_or_end(mover: LayerMover, transfer: Transfer) -> Exception | None:
        if not transfer.is_read and transfer.layers_done == 1:
            try:
                os.unlink(os.environ["DUALPATH_BENCHMARK_CRASH"])
            except FileNotFoundError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return _move(mover, transfer)

    LayerMover.move = _move_or_end  # type: ignore[method-assign, assignment]
