"""A ClientApp that Ray's actors import by name."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp


def make_app(about: Mapping[str, Any], arrays: Mapping[str, Any]) -> ClientApp:
    """Return an app that answers after a time with the sum of the array that all share."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        time.sleep(about["seconds"])
        found = {"client": context.node_config["partition-id"], "sum": int(arrays["numbers"].sum())}
        return Message(RecordDict({"found": ConfigRecord(found)}), reply_to=message)

    return app
