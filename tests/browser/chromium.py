"""Headless Chromium by its DevTools protocol over a pipe: no package, no port, no driver to install."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_TIMEOUT_S = 120.0
_SWITCHES = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--force-color-profile=srgb",
    "--font-render-hinting=none",
    "--remote-debugging-pipe",
)


def find_chromium() -> str | None:
    """Return the program named by ``FEDLP_CHROMIUM``, or the first one on the path; None where there is none."""
    named = os.environ.get("FEDLP_CHROMIUM")
    return shutil.which(named) if named else next(filter(None, map(shutil.which, _NAMES)), None)


class Chromium:
    """One running browser."""

    def __init__(self, program: str, profile: Path) -> None:
        commands, self._write = os.pipe()
        self._read, answers = os.pipe()

        def connect() -> None:  # the browser reads commands from descriptor 3 and writes answers to 4
            high = [fcntl.fcntl(one, fcntl.F_DUPFD, 10) for one in (commands, answers)]
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        self._process = subprocess.Popen(
            [program, *_SWITCHES, f"--user-data-dir={profile}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=False,
            preexec_fn=connect,
        )
        os.close(commands)
        os.close(answers)
        self._buffer, self._count = b"", 0
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result; events that come before it are kept."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        os.write(self._write, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return dict(answer["result"])

    def wait(self, is_it: Callable[[Mapping[str, Any]], bool]) -> None:
        """Return when an event is there for which ``is_it`` holds."""
        while not any(is_it(event) for event in self.events):
            self._next()

    def close(self) -> None:
        """End the browser."""
        os.close(self._write)
        os.close(self._read)
        self._process.terminate()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _next(self) -> dict[str, Any]:
        """Return the next message; an event is kept as well."""
        until = time.monotonic() + _TIMEOUT_S
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, until - time.monotonic()))
            more = os.read(self._read, 1 << 20) if ready else b""
            assert more, "Chromium ended or does not answer"
            self._buffer += more
        line, self._buffer = self._buffer.split(b"\0", 1)
        message: dict[str, Any] = json.loads(line)
        if "method" in message:
            self.events.append(message)
        return message


class Page:
    """One open page at a width and in a colour scheme; what it logs, throws and asks for is on record."""

    def __init__(self, browser: Chromium, url: str, *, width: int, scheme: str = "light", height: int = 900) -> None:
        self._browser = browser
        self._context = browser.call("Target.createBrowserContext")["browserContextId"]  # remembers nothing of others
        made = browser.call("Target.createTarget", url="about:blank", browserContextId=self._context)
        self._target = made["targetId"]
        found = browser.call("Target.attachToTarget", targetId=self._target, flatten=True)
        self._session = found["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._call("Page.navigate", url=url)
        browser.wait(lambda event: event["method"] == "Page.loadEventFired" and self._is_mine(event))
        self.run(
            "document.fonts.ready.then(() => new Promise((go) => requestAnimationFrame(() => setTimeout(go, 50))))"
        )

    def run(self, expression: str) -> Any:
        """Return the value of a JavaScript expression; that of its promise."""
        options = {"returnByValue": True, "awaitPromise": True}
        found = self._call("Runtime.evaluate", expression=expression, **options)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, key: str, code: int, text: str = "") -> None:
        """Press and release a key where the focus is."""
        more = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self._call("Input.dispatchKeyEvent", type="keyDown", **more, **({"text": text} if text else {}))
        self._call("Input.dispatchKeyEvent", type="keyUp", **more)

    def screenshot(self) -> bytes:
        """Return the part of the page that is seen, as PNG."""
        return base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"])

    @property
    def complaints(self) -> list[str]:
        """Errors and warnings of the console, and exceptions."""
        found = []
        for event in filter(self._is_mine, self._browser.events):
            values = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                found.append(str(values["exceptionDetails"].get("exception", values)))
            if event["method"] == "Runtime.consoleAPICalled" and values["type"] in ("error", "warning", "assert"):
                found.append(str(values["args"]))
            if event["method"] == "Log.entryAdded" and values["entry"]["level"] in ("error", "warning"):
                found.append(values["entry"]["text"])
        return found

    @property
    def requests(self) -> list[str]:
        """What was asked for from anywhere but the disk and the page itself."""
        mine = [one for one in self._browser.events if one["method"] == "Network.requestWillBeSent"]
        urls = [one["params"]["request"]["url"] for one in mine if self._is_mine(one)]
        return [url for url in urls if not url.startswith(("file:", "data:", "blob:", "about:"))]

    @property
    def overflow(self) -> int:
        """Pixels by which the page is wider than its window; 0 for none."""
        return int(self.run("Math.max(0, document.documentElement.scrollWidth - document.documentElement.clientWidth)"))

    def close(self) -> None:
        """Close the page."""
        self._browser.call("Target.closeTarget", targetId=self._target)
        self._browser.call("Target.disposeBrowserContext", browserContextId=self._context)

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **parameters)

    def _is_mine(self, event: Mapping[str, Any]) -> bool:
        return event.get("sessionId") == self._session
