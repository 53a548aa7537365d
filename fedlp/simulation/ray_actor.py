"""Ray actor: the clients' side of the grid in a process of a node. It is given texts and numbers, and returns bytes."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from fedlp import __version__
from fedlp.errors import FedLPError
from fedlp.federation import flower_compat
from fedlp.simulation.parcel import HandOver, make_app
from fedlp.simulation.ray_frames import Image, LooseBuffers, encode_reply
from fedlp.simulation.worker import Node, settle_process


class _Lines(logging.Handler):
    """Warnings of fedlp's log, kept for the server."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._kept: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._kept.append(record.getMessage())

    def take(self) -> list[str]:
        """Return the lines since the last call."""
        kept, self._kept = self._kept, []
        return kept


class RayActor:
    """Clients of one node: builds the ClientApp once, then answers one message after another."""

    def __init__(self) -> None:
        self._lines = _Lines()
        self._node: Node | None = None

    def begin(self, text: str, *arrays: NDArray[Any]) -> str:
        """Build the app of the run.

        Parameters
        ----------
        text : str
            JSON: ``version`` of fedlp; ``maker``, ``about`` and names of ``arrays`` of a hand-over; ``run_config``;
            ``num_clients``; ``mark``, a file that the server has written, or null.
        arrays : arrays
            In the object store, which all actors of a node map.

        Returns
        -------
        str
            JSON: ``error``, a line or null; ``sees_mark``, whether the file is there.
        """
        about = json.loads(text)
        log = logging.getLogger("fedlp")
        log.handlers, log.propagate = [self._lines], False
        if about["version"] != __version__:
            return json.dumps({"error": f"it has fedlp {__version__}, the server {about['version']}"})
        settle_process()
        flower_compat.become_server()
        warnings.filterwarnings("ignore", message="The given (NumPy array|buffer) is not writable")
        content = HandOver(about["maker"], about["about"], dict(zip(about["arrays"], arrays, strict=True)))
        try:
            self._node = Node(make_app(content), about["run_config"], about["num_clients"])
        except FedLPError as error:
            return json.dumps({"error": str(error)})
        mark = about["mark"]
        return json.dumps({"error": None, "sees_mark": mark is not None and Path(mark).is_file()})

    def answer(self, frame: bytes, image: Image | bytes) -> bytes:
        """Return the reply to one message.

        Parameters
        ----------
        image : (n,) uint8 or empty bytes
            Large arrays of the message.
        """
        assert self._node is not None
        down, up = LooseBuffers(memoryview(image if isinstance(image, bytes) else image.data)), LooseBuffers()
        reply = self._node.reply(frame, down, up)
        return encode_reply(reply, up.written, self._lines.take())
