"""Jobs: the one-sided transfers of an agent for its engines, each from its message to its end.

A *job* is one ``Deliver`` or ``PullBlocks`` of an engine (``deliver_jobs.py``, ``pull_jobs.py``).
It has a *transfer* for each rank of the engine (``transfer.py``) and ends when the last of them
has (``job.py``). Transfers take turns layer by layer (``turns.py``) in the worker threads of a
queue (``transfer_queue.py``), which move them (``layers.py``).
"""
