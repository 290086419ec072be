"""Whether a service is ready: `python -m farm.check`.

Containers ask every few seconds, so this needs nothing but the standard library. It asks no proxy: a service that is
reached by one is not the one of this container.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import os
import re
import sys
from urllib.parse import unquote, urlsplit


def address(host: str, port: int | str) -> str:
    """The URL of a service that listens there: of one that listens everywhere, as it is reached from here."""
    host = host.strip("[]")
    with contextlib.suppress(ValueError):
        parsed = ipaddress.ip_address(host)
        if parsed.is_unspecified:
            host = "::1" if parsed.version == 6 else "127.0.0.1"
    return f"http://[{host.replace('%', '%25')}]:{port}" if ":" in host else f"http://{host}:{port}"


def service(url: str) -> str:
    """The URL of a service, as people write it."""
    scheme, _, rest = (url if "://" in url else f"http://{url}").strip().partition("://")
    return f"{scheme}://{rest.rstrip('/')}"


def shown(url: str) -> str:
    """For messages: without a password."""
    return re.sub("//[^/]*@", "//", url)


def check(url: str) -> int:
    """Exit status 0 when the service is ready, else 1."""
    url = service(url)
    try:
        status, text = _get(f"{url}/readyz")
    except (OSError, ValueError, http.client.HTTPException) as error:
        print(f"{shown(url)} does not answer: {error}", file=sys.stderr)
        return 1
    print(text)
    return 0 if status == 200 else 1


def _get(url: str) -> tuple[int, str]:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError("it is no address as http://127.0.0.1:8000")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    with contextlib.closing(kind(unquote(parts.hostname), parts.port, timeout=5)) as connection:
        connection.request("GET", parts.path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def here() -> str:
    """The URL of the service that these settings start."""
    return address(os.environ.get("BOTFARM_HOST") or "127.0.0.1", os.environ.get("BOTFARM_PORT") or "8000")


if __name__ == "__main__":
    sys.exit(check(here()))
