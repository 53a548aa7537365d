"""Ends with 0 where a URL of this container answers: ``health.py URL [CA]``; https, http, or tcp: only connects."""

import ssl
import sys
from socket import create_connection
from urllib.parse import urlsplit
from urllib.request import HTTPSHandler, ProxyHandler, build_opener

TIMEOUT_S = 5


def ask(url: str, ca: str | None = None) -> None:
    """Ask without a proxy; OSError where nobody answers, or with an error or the certificate of another CA."""
    if url.startswith("tcp:"):
        where = urlsplit(url)
        create_connection((where.hostname, where.port), TIMEOUT_S).close()
        return
    context = ssl.create_default_context(cafile=ca)
    build_opener(ProxyHandler({}), HTTPSHandler(context=context)).open(url, timeout=TIMEOUT_S).close()


if __name__ == "__main__":
    try:
        ask(*sys.argv[1:])
    except OSError as error:
        sys.exit(f"{sys.argv[1]} does not answer: {error}")
