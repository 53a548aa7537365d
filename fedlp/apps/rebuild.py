"""Federation built again in another process of this machine, from JSON values and arrays; nothing is unpickled."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fedlp.apps.client_app import AppOf
from fedlp.apps.federate import Federation
from fedlp.apps.packed_federation import Arrays, unpack
from fedlp.apps.runs import federation_of

log = logging.getLogger("fedlp")


def rebuild(about: Mapping[str, Any], arrays: Arrays) -> Federation:
    """Return the federation that :func:`fedlp.apps.packed_federation.pack` was given; it maps the arrays.

    Raises
    ------
    FedLPError
        If a value has the wrong form, or a part of the user's cannot be imported.
    """
    packed = unpack(about, arrays)
    log.disabled = True  # the parent has said it
    try:
        return federation_of(packed.config, data=packed.data, parts=packed.parts)
    finally:
        log.disabled = False


def rebuild_app(about: Mapping[str, Any], arrays: Arrays) -> Any:
    """Return the app, a Flower ClientApp, of a federation built again; its log goes where the parent's does.

    Raises
    ------
    FedLPError
        As :func:`rebuild`.
    """
    app = AppOf(rebuild(about, arrays))()
    if about["logs"]:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("fedlp: %(message)s"))
        log.handlers, log.propagate = [handler], False
    return app
