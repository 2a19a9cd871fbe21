"""What measurements and tests change in the product, and no operator should."""

from __future__ import annotations

import logging

import msgspec


class Experiment(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Ways in which a process departs from the product; by default, none.

    No flag and no key of a configuration file holds one. Benchmarks put it into the settings of
    single processes (:mod:`benchmarks.testbed.cluster`), ``--poison-kv`` into every engine's, and
    a path policy for measurements (:mod:`benchmarks.testbed.oracle`), where the flag names it, into
    its plans and all processes. Whoever has one says so in its log.
    """

    poison_kv: bool = False
    """Engines fill their KV pool with noise at start and after each flush."""
    keep_prefixes: bool = True
    """False: an engine's own cache forgets a prefix as soon as no request needs it, so that
    every hit is delivered."""
    load_by_layer: bool = True
    """False: a forward's first layer waits for the hits of all layers."""
    send_by_layer: bool = True
    """False: SGLang sends a request's new KV after the forward."""
    dram_keep: bool = True
    """False: blocks stay in an agent's DRAM only while a plan or a write needs them."""
    zero_io: bool = False
    """The paper's Oracle: every block counts as read, and a delivery writes its completion
    words but no KV. Tokens are wrong by design. An agent without it refuses such plans, an engine
    with it stores nothing, and no engine stores what such a plan gave."""

    @property
    def departures(self) -> list[str]:
        """Each as ``name=value``."""
        return [f"{name}={value}" for name, value in msgspec.to_builtins(self).items()]

    def announce(self, log: logging.Logger) -> None:
        """Warn of what is in force, if anything is."""
        if self.departures:
            log.warning("EXPERIMENT in force, not the product: %s", ", ".join(self.departures))


NO_EXPERIMENT = Experiment()
