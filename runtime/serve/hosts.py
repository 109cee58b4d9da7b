"""Names in the Host header: a page of another site that has pointed its own name at this machine (DNS rebinding) is of
this server's origin to a browser, and gives itself away by that name alone."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .answers import error_response

if TYPE_CHECKING:
    from starlette.datastructures import Headers
    from starlette.responses import Response

__all__ = ["Hosts"]

_PORT = re.compile(r":\d*$")


class Hosts:
    """One of these names must be asked for, at any port; none for no such check."""

    def __init__(self, names: Sequence[str]) -> None:
        """They may be written as in the header, at a port and in brackets, or not."""
        self._names = {_plain(name) for name in names}

    def refused(self, headers: Headers) -> Response | None:
        """The answer to a request with these headers that must not come in."""
        host = headers.get("host")
        if not self._names or host is None:  # browsers always name one
            return None
        name = _plain(host)
        if name in self._names:
            return None
        return error_response(
            403,
            f"this server is not known as {name[:80]!r}; ask for localhost, or start it with --allowed-host and that "
            "name",
        )


def _plain(host: str) -> str:
    """In lower case, without port and the dot of a full domain name; an IPv6 address in brackets."""
    try:
        return f"[{ipaddress.IPv6Address(host)}]"
    except ValueError:
        return _PORT.sub("", host).lower().removesuffix(".")
