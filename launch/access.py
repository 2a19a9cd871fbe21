"""What a client needs to be let in, and to know whom it talks to."""

from __future__ import annotations

import ssl
from dataclasses import dataclass


@dataclass(frozen=True)
class Access:
    """To one gateway."""

    key: str = ""
    ca_certs: str = ""
    """PEM file; empty means the system's."""
    any_name: bool = False
    """The certificate may be for another name than the one called."""

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"} if self.key else {}

    def tls(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.ca_certs or None)
        context.check_hostname = not self.any_name
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # as in Python 3.13
        return context


NO_KEY = Access()
