"""What an operator may set of the doors."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from launch.gateway.doors.keys import ApiKey


class DoorSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Not secret."""

    share_cache: Annotated[
        bool,
        Meta(
            description="Tenants share cached prefixes, and can tell that another had one: no "
            "cache salt is derived from their API keys."
        ),
    ] = False
    allowed_hosts: Annotated[
        tuple[str, ...],
        Meta(
            description="Names, comma-separated, by which clients may call the gateway (header "
            "Host), beside its addresses; empty means localhost where --host is the loopback, else "
            "any."
        ),
    ] = ()
    allowed_origins: Annotated[
        tuple[str, ...],
        Meta(
            description="Origins, comma-separated, such as https://chat.example, whose pages may "
            "call the gateway from a browser; empty means none."
        ),
    ] = ()
    ssl_certfile: Annotated[
        str, Meta(description="Certificate (PEM) with which the gateway serves HTTPS.")
    ] = ""
    ssl_keyfile: Annotated[str, Meta(description="Its private key.")] = ""
    ssl_ca_certs: Annotated[
        str,
        Meta(
            description="CA certificates (PEM) by which launch.rollout knows the gateway; empty "
            "means the system's."
        ),
    ] = ""


class DoorKeys(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Secret."""

    api_keys: Annotated[
        tuple[ApiKey, ...],
        Meta(
            description="Whoever generates must have this key, or one of several: lines of KEY or "
            "TENANT: KEY in a file (docs/security.md)."
        ),
    ] = ()
    admin_api_keys: Annotated[
        tuple[ApiKey, ...],
        Meta(
            description="Operators' routes (/admin/*, /flush_cache) need this key, or one of "
            "several; without it they are for this host alone."
        ),
    ] = ()
    ssl_keyfile_password: Annotated[str, Meta(description="Password of --ssl-keyfile.")] = ""
    engine_key: str = ""
    """With which the gateway calls the engines."""
