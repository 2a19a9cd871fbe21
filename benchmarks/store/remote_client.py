"""Readers of one bucket's packs: the remote tier, plain clients, and s3fs.

``python -m benchmarks.store.remote_client JSON`` measures the tier alone, for a process that
has to be in a network namespace; the argument is a :class:`Job`, the result is printed.
"""

from __future__ import annotations

import http.client
import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import msgspec

from benchmarks.store.load import DEPTH, LoadFailed, Memory, TierLoad, checked
from common.block import BlockKey
from storage.remote.tier import RemoteSettings, RemoteTier
from storage.tiers.contract import BlockIO
from storage.tiers.io_threads import SWITCH_INTERVAL_S

BLOCK_BYTES = 4 << 20
BLOCKS = 96
"""That are stored, more than are in flight at once."""
READ_BLOCKS = 160
"""That are read in a round."""
THREADS = 8
"""Of the plain clients."""
LOOK_S_MAX = 60.0


class Rate(NamedTuple):
    """Of one round."""

    bytes_per_s: float
    cpu_s_per_gb: float
    """Of the client's process, user and system."""


class Span(NamedTuple):
    """Where a block, with its header, lies."""

    path: str
    start: int
    nbytes: int


class Job(msgspec.Struct):
    """What a client in a namespace does."""

    url: str
    options: dict[str, Any]
    fill: bool = False
    """Store the blocks first."""
    read_blocks: int = READ_BLOCKS
    beside_uploads: bool = False


def rated(nbytes: int, work: Callable[[], object]) -> Rate:
    """What ``work``, which moves so many bytes, needs."""
    start, cpu_start = time.perf_counter(), time.process_time()
    work()
    cpu_s = time.process_time() - cpu_start
    return Rate(nbytes / (time.perf_counter() - start), cpu_s / (nbytes / 1e9))


class RemoteLoad(TierLoad[RemoteTier]):
    """Of a remote tier."""

    def __init__(
        self,
        url: str,
        options: dict[str, Any],
        memory: Memory,
        block_bytes: int = BLOCK_BYTES,
        settings: RemoteSettings | None = None,
    ) -> None:
        wake = threading.Event()
        super().__init__(RemoteTier(url, options, wake.set, settings), wake, block_bytes, memory)

    def fill(self, blocks: int) -> None:
        self._run(self._new_block, self.tier.submit_writes, blocks)

    def begin_uploads(self, blocks: int) -> None:
        """Go on with these beside what is read; nobody waits for them."""
        payload = memoryview(bytes(self.block_bytes))
        keys = [self._new_block() for _ in range(blocks)]
        poll = self.tier.poll
        self.tier.poll = lambda: [c for c in poll() if not c.is_write]  # type: ignore[method-assign]
        self.tier.submit_writes([BlockIO(key, payload) for key in keys])

    def find(self, blocks: int) -> list[BlockKey]:
        """The keys, once so many are known."""
        end = time.monotonic() + LOOK_S_MAX
        while len(self.tier.keys()) < blocks:
            if time.monotonic() > end:
                raise LoadFailed(f"{len(self.tier.keys())} of {blocks} blocks were found")
            self.tier.poll()
            time.sleep(0.01)
        return self.tier.keys()

    def read_some(self, blocks: int) -> Rate:
        """Random blocks, verified."""
        keys = self.tier.keys()
        whole = -(-blocks // 16) * 16
        return rated(
            whole * self.block_bytes,
            lambda: self._run(lambda: self._chance.choice(keys), self.tier.submit_reads, whole),
        )

    def latencies_s(self, reads: int) -> list[float]:
        """Of reads one after the other, sorted."""
        keys, seen = self.tier.keys(), []
        for _ in range(reads):
            start = time.perf_counter()
            self.tier.submit_reads([BlockIO(self._chance.choice(keys), self._buffers[0])])
            self._finish(1)
            seen.append(time.perf_counter() - start)
        return sorted(seen)

    def _finish(self, blocks: int) -> None:
        while blocks:
            self._wake.clear()
            completions = self.tier.poll()
            for completion in completions:
                checked(completion)
            blocks -= len(completions)
            if not completions:
                self._wake.wait(1.0)

    def read_together(self, blocks: int, batch: int) -> float:
        """Bytes per second of neighbouring blocks, asked for ``batch`` at a time."""
        keys, start = self.tier.keys()[:blocks], time.perf_counter()
        for first in range(0, blocks, DEPTH):
            part = keys[first : first + DEPTH]
            for at in range(0, len(part), batch):
                pairs = zip(part[at : at + batch], self._buffers[at:], strict=False)
                self.tier.submit_reads([BlockIO(key, buffer) for key, buffer in pairs])
            self._finish(len(part))
        return blocks * self.block_bytes / (time.perf_counter() - start)


def in_threads(reads: int, read: Callable[[int, int], None]) -> None:
    """``read(thread, number)`` for every number below ``reads``."""
    numbers, lock = iter(range(reads)), threading.Lock()
    errors: list[Exception] = []

    def work(thread: int) -> None:
        while not errors:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            try:
                read(thread, number)
            except Exception as error:  # handed to the thread that waits
                errors.append(error)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(THREADS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise LoadFailed(f"a plain client failed: {errors[0]}") from errors[0]


class PlainClients:
    """Read the blocks' bytes, and look at none of them."""

    def __init__(
        self, bucket: str, options: dict[str, Any], spans: list[Span], memory: Memory
    ) -> None:
        self._bucket, self._options, self._spans = bucket, options, spans
        self._views = memory.buffers(BLOCK_BYTES)

    def all(self) -> dict[str, Callable[[int], None]]:
        return {"obstore": self._obstore(), "http.client": self._http(), "s3fs": self._s3fs()}

    def _span(self, number: int) -> Span:
        return self._spans[number * 7 % len(self._spans)]

    def _obstore(self) -> Callable[[int], None]:
        import obstore
        from obstore.store import S3Store

        endpoint = self._options["endpoint_url"]
        store = S3Store(
            self._bucket,
            access_key_id=self._options["key"],
            secret_access_key=self._options["secret"],
            endpoint=endpoint,
            region="us-east-1",
            client_options={"allow_http": True},
        )

        def read(thread: int, number: int) -> None:
            path, start, nbytes = self._span(number)
            data = memoryview(obstore.get_range(store, path, start=start, length=nbytes))
            self._views[thread][: nbytes - 4096] = data[4096:]

        return lambda reads: in_threads(reads, read)

    def _http(self) -> Callable[[int], None]:
        from botocore.auth import S3SigV4Auth
        from botocore.awsrequest import AWSRequest
        from botocore.credentials import Credentials

        signer = S3SigV4Auth(
            Credentials(self._options["key"], self._options["secret"]), "s3", "us-east-1"
        )
        address = urlsplit(self._options["endpoint_url"]).netloc
        connections = [http.client.HTTPConnection(address, timeout=30) for _ in range(THREADS)]

        def read(thread: int, number: int) -> None:
            path, start, nbytes = self._span(number)
            url = f"/{self._bucket}/{path}"
            request = AWSRequest("GET", f"http://{address}{url}")
            request.headers["Range"] = f"bytes={start}-{start + nbytes - 1}"
            signer.add_auth(request)
            connections[thread].request("GET", url, headers=dict(request.headers))
            answer, got = connections[thread].getresponse(), 0
            header, view = bytearray(4096), self._views[thread]
            answer.readinto(header)
            while got < nbytes - 4096 and (part := answer.readinto(view[got : nbytes - 4096])):
                got += part
            answer.read()
            if got != nbytes - 4096:
                raise LoadFailed(f"{got} bytes of {nbytes}")

        return lambda reads: in_threads(reads, read)

    def _s3fs(self) -> Callable[[int], None]:
        import s3fs

        filesystem = s3fs.S3FileSystem(skip_instance_cache=True, **self._options)

        def read(reads: int) -> None:
            for first in range(0, reads, THREADS):
                spans = [self._span(n) for n in range(first, min(first + THREADS, reads))]
                parts = filesystem.cat_ranges(
                    [f"{self._bucket}/{span.path}" for span in spans],
                    [span.start for span in spans],
                    [span.start + span.nbytes for span in spans],
                )
                for view, part in zip(self._views, parts, strict=False):
                    view[: len(part) - 4096] = memoryview(part)[4096:]

        return read


def main(argument: str) -> int:
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    sys.setswitchinterval(SWITCH_INTERVAL_S)  # as in an agent
    job = msgspec.json.decode(argument, type=Job)
    # where uploads count, small packs: only whole ones are counted
    settings = RemoteSettings(pack_bytes=BLOCK_BYTES if job.beside_uploads else 64 << 20)
    memory = Memory(DEPTH * BLOCK_BYTES)
    load = RemoteLoad(job.url, job.options, memory, settings=settings)
    try:
        if job.fill:
            load.fill(BLOCKS)
            print("{}")
            return 0
        load.find(BLOCKS)
        if job.beside_uploads:
            load.begin_uploads(2 * READ_BLOCKS)
        rate = load.read_some(job.read_blocks)
        written_bytes = load.tier.stats().io.write_bytes_total
        figures = {**rate._asdict(), "uploaded_bytes": written_bytes}
        print(msgspec.json.encode(figures).decode())
    finally:
        load.tier.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
