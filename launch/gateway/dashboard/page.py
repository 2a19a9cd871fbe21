"""The page and its headers: no build, nothing from elsewhere, no data in it.

Its style and scripts stand in the page itself, and the browser runs what has their digests alone.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent
SCRIPTS = ("draw.js", "minutes.js", "state.js", "requests.js", "page.js")
PARTS = {"page.css": "style"} | dict.fromkeys(SCRIPTS, "script")
"""Files, and the element that each becomes: ``<style>page.css</style>`` in the page."""


@cache
def page() -> bytes:
    """All of it."""
    text = (FOLDER / "page.html").read_text()
    for name, element in PARTS.items():
        content = (FOLDER / name).read_text()
        text = text.replace(f"<{element}>{name}<", f"<{element}>{content}<")
    return text.encode()


@cache
def headers() -> dict[str, str]:
    """A browser lets the page call its own gateway, and nothing else."""
    digests: dict[str, list[str]] = {"style": [], "script": []}
    for name, element in PARTS.items():
        digest = hashlib.sha256((FOLDER / name).read_bytes()).digest()
        digests[element].append(f"'sha256-{base64.b64encode(digest).decode()}'")
    policy = [
        "default-src 'none'",
        f"script-src {' '.join(digests['script'])}",
        f"style-src {' '.join(digests['style'])}",
        "connect-src 'self'",
        "img-src data:",  # an empty icon, which is not asked for then
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
    return {
        "content-security-policy": "; ".join(policy),
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "cache-control": "no-cache",
    }
