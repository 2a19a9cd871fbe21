"""The remote tier over a real S3 server, and over a bad way to it."""

from __future__ import annotations

import random
import ssl
import subprocess
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import msgspec
import pytest

from benchmarks.radosgw import RadosGateway
from benchmarks.s3_proxy import Fault, FaultyProxy, Verdict
from storage.remote.objects import s3_store
from storage.remote.objects.fsspec_store import FsspecStore
from storage.remote.objects.open_store import open_store
from storage.remote.objects.s3_store import PART_BYTES, S3Settings, S3Store
from storage.remote.tier import RemoteTier, RemoteUnusable
from storage.tiers.contract import BlockCorrupt, BlockIO, BlockMissing
from tests.storage.conftest import QUICK, finish, key_of, no_wake, payload_of, read, write
from tests.storage.remote.pack_files import pack_stats

BLOCKS = 40


@pytest.fixture
def url(radosgw: RadosGateway) -> str:
    return f"s3://{radosgw.bucket}/{uuid.uuid4().hex}"


@pytest.fixture
def proxy(radosgw: RadosGateway) -> Iterator[FaultyProxy]:
    host, _, port = radosgw.options["endpoint_url"].removeprefix("http://").partition(":")
    proxy = FaultyProxy(host, int(port))
    yield proxy
    proxy.close()


def through(proxy: FaultyProxy, radosgw: RadosGateway) -> dict[str, Any]:
    return {**radosgw.options, "endpoint_url": f"http://127.0.0.1:{proxy.port}"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault", [Fault.ERROR_500, Fault.ERROR_503, Fault.RESET, Fault.TRUNCATE, Fault.STALL]
)
def test_passing_faults_are_not_seen(
    radosgw: RadosGateway,
    proxy: FaultyProxy,
    url: str,
    monkeypatch: pytest.MonkeyPatch,
    fault: Fault,
) -> None:
    monkeypatch.setattr(s3_store, "SILENCE_TIMEOUT_S", 0.3)
    tier = RemoteTier(url, through(proxy, radosgw), no_wake, QUICK)
    chance, judged = random.Random(3), Counter[Fault]()

    def judge(method: str, path: str) -> Verdict:
        found = fault if chance.random() < 0.3 else Fault.NONE
        judged[found] += 1
        return Verdict(found, chance.uniform(0, 0.01))

    proxy.judge = judge
    keys = [key_of(i) for i in range(BLOCKS)]
    for start in range(0, BLOCKS, 8):
        assert all(c.error is None for c in write(tier, *keys[start : start + 8]).values())
    for key in keys:
        completion, data = read(tier, key)
        assert completion.error is None and data == payload_of(key)
    assert judged[fault] and tier.stats().io.retries_total
    assert tier.stats().io.corrupt_blocks_total == 0
    tier.close()


@pytest.mark.slow
def test_a_store_that_is_away_costs_the_blocks_and_comes_back(
    radosgw: RadosGateway, proxy: FaultyProxy, url: str
) -> None:
    settings = msgspec.structs.replace(QUICK, timeout_s=1)
    tier = RemoteTier(url, through(proxy, radosgw), no_wake, settings)
    write(tier, key_of(1))
    proxy.judge = lambda method, path: Verdict(Fault.ERROR_503)
    start = time.monotonic()
    for number in (1, 2):
        assert read(tier, key_of(number))[0].error is not None
    assert write(tier, key_of(3))[key_of(3)].error is not None
    assert time.monotonic() - start < 20
    proxy.judge = lambda method, path: Verdict()
    assert read(tier, key_of(1))[1] == payload_of(key_of(1))
    assert write(tier, key_of(3))[key_of(3)].error is None
    tier.close()


@pytest.mark.slow
def test_hedged_reads_pass_slow_answers(
    radosgw: RadosGateway, proxy: FaultyProxy, url: str
) -> None:
    settings = msgspec.structs.replace(QUICK, hedge_after_s=0.1)
    tier = RemoteTier(url, through(proxy, radosgw), no_wake, settings)
    write(tier, key_of(1))
    asked: list[str] = []

    def judge(method: str, path: str) -> Verdict:
        asked.append(path)
        return Verdict(delay_s=3.0 if len(asked) == 1 else 0.0)

    proxy.judge = judge
    start = time.monotonic()
    assert read(tier, key_of(1))[1] == payload_of(key_of(1))
    assert time.monotonic() - start < 3 and pack_stats(tier).hedged_reads_total == 1
    tier.close()


@pytest.mark.slow
def test_two_writers_at_once_leave_every_block_whole(radosgw: RadosGateway, url: str) -> None:
    tiers = [RemoteTier(url, radosgw.options, no_wake, QUICK) for _ in range(2)]
    keys = [key_of(i) for i in range(BLOCKS)]
    for tier in tiers:
        tier.submit_writes([BlockIO(key, memoryview(payload_of(key))) for key in keys])
    for tier in tiers:
        assert all(c.error is None for c in finish(tier, BLOCKS).values())
    tiers.append(RemoteTier(url, radosgw.options, no_wake, QUICK))
    for tier in tiers:
        for key in keys:
            assert read(tier, key)[1] == payload_of(key)
        tier.close()


@pytest.mark.slow
def test_of_many_that_create_an_object_one_does(radosgw: RadosGateway, url: str) -> None:
    stores = [open_store(url, radosgw.options, 10) for _ in range(4)]
    assert [store.create("lease", b"%d" % i) for i, store in enumerate(stores)].count(True) == 1
    assert bytes(stores[3].read("lease", 0, 10)) == b"0"


@pytest.mark.slow
def test_a_large_pack_goes_in_parts_and_appears_whole(radosgw: RadosGateway, url: str) -> None:
    store = open_store(url, radosgw.options, 10)
    assert isinstance(store, S3Store)
    part = random.Random(1).randbytes(PART_BYTES // 3)

    def failing() -> Iterator[bytes]:
        yield from [part] * 8
        raise RuntimeError("the writer has died")

    with pytest.raises(RuntimeError, match="has died"):
        store.write("packs/one", failing())
    assert store.list("packs") == []
    store.write("packs/one", iter([part] * 8))
    assert [found.nbytes for found in store.list("packs")] == [8 * len(part)]
    assert bytes(store.read("packs/one", 7 * len(part), 1 << 30)) == part
    assert bytes(store.read("packs/one", 1 << 30, 10)) == b""


@pytest.mark.slow
def test_damage_is_found_and_healed(radosgw: RadosGateway, url: str) -> None:
    tier, key = RemoteTier(url, radosgw.options, no_wake, QUICK), key_of(1)
    write(tier, key)
    filesystem = fsspec.filesystem("s3", use_listings_cache=False, **radosgw.options)
    (path,) = filesystem.find(f"{url}/packs")
    stored = filesystem.cat_file(path)
    for damaged in (stored[:5000] + b"?" + stored[5001:], stored[:5000], b""):
        filesystem.pipe_file(path, damaged)
        assert isinstance(read(tier, key)[0].error, BlockCorrupt)
        assert isinstance(read(tier, key)[0].error, BlockMissing)
        write(tier, key)
        assert read(tier, key)[1] == payload_of(key)
        (path,) = set(filesystem.find(f"{url}/packs")) - {path}
        filesystem.rm([p for p in filesystem.find(f"{url}/packs") if p != path])
    tier.close()


@pytest.mark.slow
def test_both_ways_to_a_bucket_read_each_others_packs(radosgw: RadosGateway, url: str) -> None:
    fast, key = RemoteTier(url, radosgw.options, no_wake, QUICK), key_of(1)
    write(fast, key)
    options = {**radosgw.options, "config_kwargs": {"retries": {"max_attempts": 1}}}
    assert isinstance(open_store(url, options, 10), FsspecStore)
    other = RemoteTier(url, options, no_wake, QUICK)
    assert read(other, key)[1] == payload_of(key)
    write(other, key_of(2))
    assert read(fast, key_of(2))[1] == payload_of(key_of(2))
    for tier in (fast, other):
        tier.close()


def private_authority(folder: Path) -> ssl.SSLContext:
    """``ca.pem`` in the folder, and what a server that it vouches for needs."""

    def openssl(*arguments: str) -> None:
        command = ["openssl", *arguments]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=20)

    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", *new, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=ours")
    openssl("req", *new, "-keyout", "key.pem", "-out", "asked.pem", "-subj", "/CN=store")
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1")
    signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-extfile", "names", "-out", "cert.pem")
    openssl("x509", "-req", "-in", "asked.pem", *signed, "-CAcreateserial")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return tls


@pytest.mark.slow
def test_a_private_authority_is_believed_if_it_is_named(
    radosgw: RadosGateway, url: str, tmp_path: Path
) -> None:
    host, _, port = radosgw.options["endpoint_url"].removeprefix("http://").partition(":")
    proxy = FaultyProxy(host, int(port), private_authority(tmp_path))
    options = {**radosgw.options, "endpoint_url": f"https://127.0.0.1:{proxy.port}"}
    with pytest.raises(RemoteUnusable):
        open_store(url, options, 5)
    store = open_store(url, {**options, "client_kwargs": {"verify": f"{tmp_path}/ca.pem"}}, 10)
    assert isinstance(store, S3Store)
    missing = {**options, "client_kwargs": {"verify": f"{tmp_path}/no.pem"}}
    with pytest.raises(RemoteUnusable, match="no.pem"):
        open_store(url, missing, 5)
    proxy.close()


@pytest.mark.slow
def test_an_unknown_bucket_and_wrong_credentials_are_refused(radosgw: RadosGateway) -> None:
    with pytest.raises(RemoteUnusable, match="no-such-bucket"):
        RemoteTier("s3://no-such-bucket/x", radosgw.options, no_wake, QUICK)
    wrong = {**radosgw.options, "secret": "wrong"}
    with pytest.raises(RemoteUnusable, match="PermissionError|PermissionDenied"):
        RemoteTier(f"s3://{radosgw.bucket}/x", wrong, no_wake, QUICK)


# ---- s3fs's options -------------------------------------------------------------------------


def test_options_of_s3fs_are_understood(tmp_path: Path) -> None:
    authority = tmp_path / "ca.pem"
    authority.write_bytes(b"certificate")
    settings = S3Settings(
        "bucket",
        {
            "key": "k",
            "secret": "s",
            "token": "t",
            "client_kwargs": {
                "endpoint_url": "https://s3.example",
                "region_name": "eu-west-1",
                "verify": str(authority),
            },
            "config_kwargs": {"s3": {"addressing_style": "path"}, "signature_version": "s3v4"},
            "use_listings_cache": False,
        },
    )
    assert settings.unknown == []
    assert settings.config == {
        "access_key_id": "k",
        "secret_access_key": "s",
        "session_token": "t",
        "region": "eu-west-1",
        "endpoint": "https://s3.example",
        "virtual_hosted_style_request": False,
    }
    assert settings.client == {"allow_http": False, "root_certificate": b"certificate"}


@pytest.mark.parametrize(
    ("endpoint", "style", "is_virtual", "asked"),
    [
        (None, "auto", True, None),
        (None, "path", False, None),
        ("http://10.0.0.1:9000", "auto", False, "http://10.0.0.1:9000"),
        ("https://s3.example", "virtual", True, "https://bucket.s3.example"),
    ],
)
def test_the_bucket_is_addressed_as_botocore_does(
    endpoint: str | None, style: str, is_virtual: bool, asked: str | None
) -> None:
    options = {"key": "k", "secret": "s", "config_kwargs": {"s3": {"addressing_style": style}}}
    settings = S3Settings("bucket", {**options, "endpoint_url": endpoint})
    assert settings.config["virtual_hosted_style_request"] is is_virtual
    assert settings.config.get("endpoint") == asked


def test_credentials_come_from_where_botocore_finds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "credentials"
    file.write_text("[kv]\naws_access_key_id = filed\naws_secret_access_key = s\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    settings = S3Settings("bucket", {"profile": "kv"})
    assert settings.credentials is not None
    assert settings.credentials()["access_key_id"] == "filed"
    assert S3Settings("bucket", {"anon": True}).config["skip_signature"] is True


def test_what_is_not_understood_is_named() -> None:
    options = {"key": "k", "secret": "s", "requester_pays": True, "client_kwargs": {"x": 1}}
    assert S3Settings("bucket", options).unknown == ["requester_pays", "x"]
