"""Jobs: the one-sided transfers of an agent for its engines, each from its message to its end.

A *job* is one ``Deliver`` or ``PullBlocks`` of an engine (:mod:`.deliver_jobs`, :mod:`.pull_jobs`).
It has a *transfer* for each rank of the engine (:mod:`.transfer`) and ends when the last of them
has (:mod:`.job`). Transfers take turns layer by layer, pulls by as many layers as one batch has
(:mod:`.turns`), in the worker threads of a queue (:mod:`.transfer_queue`), which move them
(:mod:`.layers`).
"""
