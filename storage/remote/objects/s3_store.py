"""S3 and what speaks its protocol, through obstore: about half the CPU of s3fs a byte.

The user writes s3fs's options, whichever way is taken. What is not understood here, or where
obstore is not installed, goes through s3fs, with a line in the log.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from storage.block_format import Buffer
from storage.remote.objects.object_store import RemoteUnusable, StoredObject

if TYPE_CHECKING:
    from obstore.store import S3Credential
    from obstore.store import S3Store as Bucket

logger = logging.getLogger(__name__)

PART_BYTES = 8 << 20
"""Of a multipart upload; what is smaller goes in one request."""
CONNECT_TIMEOUT_S = 5.0
SILENCE_TIMEOUT_S = 5.0
"""A request from which nothing comes for so long is given up, and tried again."""
_OF_NO_MEANING = {
    "asynchronous",
    "cache_regions",
    "default_block_size",
    "default_cache_type",
    "default_fill_cache",
    "fixed_upload_size",
    "listings_expiry_time",
    "max_concurrency",
    "max_paths",
    "skip_instance_cache",
    "use_listings_cache",
    "use_ssl",
    "version_aware",
}
"""Options of s3fs that say nothing about who is asked, and how."""


class S3Store:
    """One bucket's objects below a prefix. Nothing is tried twice here: the caller does."""

    def __init__(self, store: Bucket) -> None:
        self._store = store

    def read(self, path: str, start: int, nbytes: int) -> Buffer:
        import obstore

        try:
            return memoryview(obstore.get_range(self._store, path, start=start, length=nbytes))
        except obstore.exceptions.GenericError as error:
            if "416 Range Not Satisfiable" in str(error):
                return b""
            raise

    def write(self, path: str, parts: Iterable[Buffer]) -> None:
        import obstore

        source = iter(parts)
        head = _first_bytes(source, PART_BYTES)
        if sum(map(len, head)) < PART_BYTES:
            self.create(path, b"".join(head))  # refused: an earlier try of ours did arrive
            return
        everything = itertools.chain(head, source)
        obstore.put(
            self._store,
            path,
            everything,
            use_multipart=True,
            chunk_size=PART_BYTES,
            max_concurrency=1,
        )

    def create(self, path: str, data: bytes) -> bool:
        import obstore

        try:
            obstore.put(self._store, path, data, mode="create", use_multipart=False)
        except obstore.exceptions.AlreadyExistsError:
            return False
        except obstore.exceptions.PermissionDeniedError as error:
            raise PermissionError(str(error)) from error
        return True

    def list(self, folder: str) -> list[StoredObject]:
        import obstore

        pages = obstore.list(self._store, folder or None)
        return [StoredObject(found["path"], found["size"]) for page in pages for found in page]

    def delete(self, path: str) -> None:
        import obstore

        try:
            obstore.delete(self._store, path)
        except FileNotFoundError:
            pass


def _first_bytes(source: Iterator[Buffer], nbytes: int) -> list[Buffer]:
    """So many bytes of the parts, or all if they are fewer."""
    head, taken = [], 0
    for part in source:
        head.append(part)
        taken += len(part)
        if taken >= nbytes:
            break
    return head


def open_s3(url: str, options: Mapping[str, object], timeout_s: float) -> S3Store | None:
    """None if the URL, or an option, is not for this way. Raises :class:`RemoteUnusable`."""
    parts = urlsplit(url)
    if parts.scheme not in ("s3", "s3a"):
        return None
    try:
        from obstore.store import S3Store as Bucket
    except ImportError:
        logger.warning("obstore is not installed: %s goes through s3fs, at twice the CPU", url)
        return None
    try:
        settings = S3Settings(parts.netloc, dict(options))
    except OSError as error:
        raise RemoteUnusable(url, str(error)) from error
    if settings.unknown:
        logger.warning("%s goes through s3fs, for the options %s", url, settings.unknown)
        return None
    timeouts = {
        "timeout": timedelta(seconds=timeout_s),
        "connect_timeout": timedelta(seconds=min(CONNECT_TIMEOUT_S, timeout_s)),
        "read_timeout": timedelta(seconds=min(SILENCE_TIMEOUT_S, timeout_s)),
    }
    try:
        bucket = Bucket(
            parts.netloc,
            prefix=parts.path.strip("/") or None,
            config=settings.config,  # type: ignore[arg-type]
            client_options={**settings.client, **timeouts},  # type: ignore[arg-type]
            retry_config={"max_retries": 0},
            credential_provider=settings.credentials,
        )
    except Exception as error:  # obstore's own, without a common base
        raise RemoteUnusable(url, str(error).partition("\n\nDebug source")[0]) from error
    return S3Store(bucket)


class S3Settings:
    """s3fs's options in obstore's words; ``unknown`` are those that have none."""

    def __init__(self, bucket: str, options: dict[str, object]) -> None:
        client = _pop_mapping(options, "client_kwargs")
        config = _pop_mapping(options, "config_kwargs")
        s3 = _pop_mapping(config, "s3")
        for name in _OF_NO_MEANING:
            options.pop(name, None)
        self.config: dict[str, object] = {}
        self.client: dict[str, object] = {}
        self.credentials: Callable[[], S3Credential] | None = None
        profile = _pop_text(options, "profile")
        of_client = _pop_text(client, "endpoint_url")
        endpoint = _pop_text(options, "endpoint_url") or of_client or _environment_endpoint()
        self._set_credentials(options, client, profile)
        self._set_region(_pop_text(client, "region_name"), profile)
        self._set_endpoint(bucket, endpoint, _pop_text(s3, "addressing_style") or "auto")
        self._set_trust(client.pop("verify", None))
        if config.get("signature_version") in ("s3v4", None):
            config.pop("signature_version", None)
        config.pop("max_pool_connections", None)
        self.unknown = sorted([*options, *client, *config, *s3])

    def _set_credentials(
        self, options: dict[str, object], client: dict[str, object], profile: str | None
    ) -> None:
        names = {
            "access_key_id": ("key", "username", "aws_access_key_id"),
            "secret_access_key": ("secret", "password", "aws_secret_access_key"),
            "session_token": ("token", "aws_session_token"),
        }
        for name, others in names.items():
            for other in others:
                value = options.pop(other, None) or client.pop(other, None)
                if value:
                    self.config[name] = value
        if options.pop("anon", False):
            self.config["skip_signature"] = True
        elif "access_key_id" not in self.config:
            self.credentials = _botocore_credentials(profile)

    def _set_region(self, region: str | None, profile: str | None) -> None:
        session = None if region else _botocore_session(profile)
        if session is not None:
            region = session.get_config_variable("region")
        self.config["region"] = region or "us-east-1"

    def _set_endpoint(self, bucket: str, endpoint: str | None, addressing: str) -> None:
        """Like botocore: path style at an endpoint of one's own, unless told otherwise."""
        is_virtual = addressing == "virtual" or (addressing != "path" and not endpoint)
        self.config["virtual_hosted_style_request"] = is_virtual
        if not endpoint:
            return
        if is_virtual:
            scheme, _, host = endpoint.partition("://")
            endpoint = f"{scheme}://{bucket}.{host}"
        self.config["endpoint"] = endpoint
        self.client["allow_http"] = endpoint.startswith("http://")

    def _set_trust(self, verify: object) -> None:
        """A private certificate authority, as botocore takes it."""
        if verify is False:
            self.client["allow_invalid_certificates"] = True
            return
        bundle = verify if isinstance(verify, str) else os.environ.get("AWS_CA_BUNDLE")
        if bundle:
            self.client["root_certificate"] = Path(bundle).read_bytes()


def _pop_mapping(options: dict[str, object], name: str) -> dict[str, object]:
    """Options within an option; what is none stays, and counts as unknown."""
    value = options.get(name) or {}
    if not isinstance(value, Mapping):
        return {}
    options.pop(name, None)
    return dict(value)


def _pop_text(options: dict[str, object], name: str) -> str | None:
    value = options.pop(name, None)
    return str(value) if value else None


class _FrozenCredentials(Protocol):
    """What we read of botocore's ReadOnlyCredentials, ..."""

    access_key: str
    secret_key: str
    token: str | None


class _Credentials(Protocol):
    """... of its Credentials, ..."""

    def get_frozen_credentials(self) -> _FrozenCredentials: ...


class _Session(Protocol):
    """... and of its Session."""

    def get_config_variable(self, name: str) -> str | None: ...

    def get_credentials(self) -> _Credentials | None: ...


def _environment_endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def _botocore_session(profile: str | None) -> _Session | None:
    try:
        from botocore.session import Session
    except ImportError:
        return None
    session: _Session = Session(profile=profile)
    return session


def _botocore_credentials(profile: str | None) -> Callable[[], S3Credential] | None:
    """What finds them where s3fs would: environment, files, SSO, roles, instance metadata.

    None where botocore is missing or finds nothing: obstore then looks for itself.
    """
    session = _botocore_session(profile)
    found = session.get_credentials() if session is not None else None
    if found is None:
        return None

    def provide() -> S3Credential:
        frozen = found.get_frozen_credentials()  # renewed by botocore when they expire
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": getattr(found, "_expiry_time", None),
        }

    return provide
