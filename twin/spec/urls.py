"""URLs of services that are asked or loaded: plain ones, of this machine unless said otherwise."""

from __future__ import annotations

import contextlib
import ipaddress
from urllib.parse import urlsplit

from twin.spec.errors import SpecError

API_KEY_VARIABLE = "EPTWIN_API_KEY"


def check_url(url: str, *, allow_remote: bool) -> str:
    """The URL without a trailing slash. Raises SpecError for anything but plain http(s), and for other machines unless
    `allow_remote`: a load test of somebody's service by mistake is an attack."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise SpecError(f"is not a URL: {readable(str(error))}", field="url") from error
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment or "@" in parts.netloc:
        raise SpecError("is not a plain URL", field="url", expected="http://HOST:PORT, no query and no credentials",
                        hint=f"a key belongs into {API_KEY_VARIABLE}")  # fmt: skip
    loopback = host == "localhost"
    with contextlib.suppress(ValueError):
        loopback = loopback or ipaddress.ip_address(host).is_loopback
    if not loopback and not allow_remote:
        raise SpecError(f"{readable(host)} is another machine", field="url", expected="a loopback address",
                        hint="--allow-remote, if the service is yours")  # fmt: skip
    return url.rstrip("/").removesuffix("/v1")


def readable(text: str, most: int = 200) -> str:
    """At most `most` printable characters of what somebody else said: no terminal takes orders from a file or a service."""
    return "".join(c if c.isprintable() else " " for c in text[:most]).strip()
