"""Names in the Host header: a page of another site that has pointed its own name at this machine (DNS rebinding) is of
this server's origin to a browser, and gives itself away by that name alone."""

from __future__ import annotations

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
        """An IPv6 address may stand in brackets or not."""
        self._names = {f"[{name}]" if re.match(r"[^\[]*:", name) else name.lower() for name in names}

    def refused(self, headers: Headers) -> Response | None:
        """The answer to a request with these headers that must not come in."""
        host = headers.get("host")
        if (
            not self._names or host is None or _PORT.sub("", host).lower() in self._names
        ):  # browsers always name one
            return None
        return error_response(
            403,
            f"this server is not known as {host[:80]!r}; ask for localhost, or start it with --allowed-host and that "
            "name",
        )
