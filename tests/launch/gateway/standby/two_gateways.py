"""Two gateways of one cluster on hosts: one serves, the other takes over."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

from tests.cluster import GREEDY, Answer, Cluster, RequestFailed, get, prompt
from tests.launch.node.hosts import BACK_TIMEOUT_S, END_TIMEOUT_S, PORT, Hosts

STANDBY_PORT = PORT + 1
URLS = ",".join(f"http://10.77.2.254:{port}" for port in (PORT, STANDBY_PORT))
JOIN = f"--join={URLS}"
STANDBY_OF = f"--standby-of={URLS}"
TAKEOVER_MAX_S = 60.0
"""From a SIGKILL to an answer, on a machine that is busy with other tests: the figure to reach is
5 s and the answer's own time."""

Generate = Callable[..., list[int]]


class Stream(threading.Thread):
    """A long answer that is read to its end, whatever that is."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(daemon=True)
        self.begun = threading.Event()
        self.events: list[str] = []
        params = {**GREEDY, "max_new_tokens": 5000}
        body = {"input_ids": prompt(200, seed=9), "sampling_params": params, "stream": True}
        self._request = urllib.request.Request(
            f"{cluster.url}/generate",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        self.start()
        assert self.begun.wait(END_TIMEOUT_S)

    def run(self) -> None:
        broken = contextlib.suppress(OSError, http.client.HTTPException)
        with broken, urllib.request.urlopen(self._request, timeout=END_TIMEOUT_S) as response:
            for line in response:
                self.events += [line.decode()] if line.strip() else []
                self.begun.set()

    def ended(self) -> str:
        """Its last event."""
        self.join(END_TIMEOUT_S)
        assert not self.is_alive(), "it hangs"
        return self.events[-1]


def standing(cluster: Cluster) -> str:
    return str(json.loads(get(f"{cluster.url}/health")[1])["status"])


def wait_standby(cluster: Cluster, knows: Cluster) -> None:
    """Until it is the standby of another, and knows what that knows."""

    def there() -> bool:
        names = [
            {e["name"] for kind in ("agents", "engines") for e in one.state()[kind] if e["alive"]}
            for one in (cluster, knows)
        ]
        blocks = [one.state()["directory_blocks"] for one in (cluster, knows)]
        return standing(cluster) == "standby" and names[0] == names[1] and blocks[0] == blocks[1]

    cluster.wait_until(there, BACK_TIMEOUT_S, "it is the other's standby")


def retried(gateways: tuple[Cluster, Cluster], input_ids: list[int]) -> Answer:
    """As a client that tries one gateway after the other."""
    deadline = time.monotonic() + TAKEOVER_MAX_S
    while True:
        for gateway in gateways:
            with contextlib.suppress(OSError, http.client.HTTPException, RequestFailed):
                return gateway.generate(input_ids)
        assert time.monotonic() < deadline, "no gateway answers"
        time.sleep(0.05)


def take_over(hosts: Hosts, active: Cluster, standby: Cluster, turn: list[int]) -> Iterator[Answer]:
    """The active gateway is killed, then comes back and the other is suspended; yields the answers
    to ``turn``, whose beginning is stored, after each. The first one is active again then."""
    wait_standby(standby, knows=active)
    active.flush_engines()
    stream = Stream(active)
    active.process.kill()
    killed_s = time.monotonic()
    answer = retried((active, standby), turn)
    print(f"from the SIGKILL to an answer: {time.monotonic() - killed_s:.2f} s")
    assert "[DONE]" not in stream.ended()
    yield answer

    active.process.wait(END_TIMEOUT_S)
    back = hosts.gateway(STANDBY_OF)
    active.process = back.process
    wait_standby(active, knows=standby)
    standby.flush_engines()
    stream = Stream(standby)
    standby.process.send_signal(signal.SIGSTOP)
    stopped_s = time.monotonic()
    active.wait_until(lambda: standing(active) == "ok", TAKEOVER_MAX_S, "it has taken over")
    print(f"from the SIGSTOP to a takeover: {time.monotonic() - stopped_s:.2f} s")
    yield active.generate(turn)
    standby.process.send_signal(signal.SIGCONT)
    assert "another gateway has taken over" in stream.ended()
    wait_standby(standby, knows=active)  # it has begun anew
    yield active.generate(turn)
