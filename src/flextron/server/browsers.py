"""Web pages that a browser on the same machine shows must not use the server behind their reader's back.

A page may send requests anywhere, but says where it comes from (`Origin`, `Sec-Fetch-Site`); without a key, requests
that change something are refused unless they come from the server's own address. A page whose own name leads to this
machine (DNS rebinding) has the right origin, but asks for its own name (`Host`), which no server on loopback has.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import Scope

from flextron.serving.errors import ApiError

__all__ = ["check_host", "check_origin", "is_loopback"]

_HOST = re.compile(r"(?P<name>\[[0-9a-fA-F:.%]+\]|[^:\[\]]*)(:\d{1,5})?")
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that change nothing; what they answer, pages of other origins cannot read."""


def is_loopback(name: str) -> bool:
    """Whether a name or an address is this machine's own, which no other can reach."""
    name = name.strip("[]").lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def check_host(scope: Scope, headers: Headers, allowed: Collection[str]) -> None:
    """Refuse what came in on loopback for another machine's name.

    Args:
        scope: scope of the request.
        headers: headers of the request.
        allowed: names beside those of loopback, such as a proxy's.

    Raises:
        ApiError: it did.
    """
    server = scope.get("server")
    if not server or not is_loopback(str(server[0])):
        return
    for host in headers.getlist("host"):
        parts = _HOST.fullmatch(host.strip())
        name = parts["name"].lower() if parts else ""
        if not is_loopback(name) and name not in allowed:
            message = f"the host {host[:100]!r} is not this server's; the operator may allow it with --allowed-host"
            raise ApiError(403, message, code="host_not_allowed")


def check_origin(scope: Scope, headers: Headers, allowed: Collection[str] = ()) -> None:
    """Refuse what a page of another origin wants to change.

    Args:
        scope: scope of the request.
        headers: headers of the request.
        allowed: origins in lower case that may; `*` for all.

    Raises:
        ApiError: it came from there.
    """
    if scope["method"] in _SAFE:
        return
    origins = headers.getlist("origin")
    if "*" in allowed or (origins and all(origin.strip().lower() in allowed for origin in origins)):
        return
    own = headers.get("host", "").strip().lower()
    # the scheme does not count: a proxy may speak TLS
    is_foreign = any(origin.strip().lower().partition("://")[2] != own for origin in origins)
    if is_foreign or headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        message = "web pages of other origins may not use this server without a key; start it with --api-key"
        raise ApiError(403, message, code="origin_not_allowed")
