"""A headless Chromium, driven by its DevTools protocol: pages are opened, elements clicked, pictures taken."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def wait(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    """What ``condition`` returns as soon as that is true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "nothing came of it"
        time.sleep(0.1)
    return found


class Tab:
    """A tab; ``requests`` are the addresses that it asked for, but those of data in the page itself."""

    def __init__(self, connection: Any) -> None:
        self.connection, self.number = connection, 0
        self.requests: list[str] = []
        self.events: list[str] = []
        for domain in ("Network", "Page", "Runtime"):
            self.call(f"{domain}.enable")

    def receive(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self.connection.recv(timeout=60))
        self.events.append(message.get("method", ""))
        if self.events[-1] == "Network.requestWillBeSent":
            url = message["params"]["request"]["url"]
            self.requests += [] if url.startswith(("data:", "blob:")) else [url]
        return message

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        self.connection.send(json.dumps({"id": self.number, "method": method, "params": params}))
        while (message := self.receive()).get("id") != self.number:
            pass
        assert "error" not in message, message
        result: dict[str, Any] = message["result"]
        return result

    def open(self, url: str) -> None:
        self.events.clear()
        self.call("Page.navigate", url=url)
        while "Page.loadEventFired" not in self.events:
            self.receive()

    def evaluate(self, script: str) -> Any:
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def click(self, text: str) -> None:
        """Click the button of this text with the mouse, as a person does."""
        find = f"[...document.querySelectorAll('button')].find(b => b.innerText.trim() == {json.dumps(text)})"
        box = f"(b => b && !b.disabled && JSON.stringify(b.getBoundingClientRect()))({find})"
        where = json.loads(wait(lambda: self.evaluate(box)))
        at = {"x": where["x"] + where["width"] / 2, "y": where["y"] + where["height"] / 2}
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)

    def picture(self) -> np.ndarray:
        """What is seen, (H, W, 3)."""
        data = base64.b64decode(self.call("Page.captureScreenshot")["data"])
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@contextmanager
def tab(url: str, profile: Path) -> Iterator[Tab]:
    """A tab at ``url`` of a browser for which no name resolves: what is not on this machine, it cannot reach."""
    from websockets.sync.client import connect

    options = "--headless --no-sandbox --no-first-run --disable-background-networking --disable-component-update"
    options += " --disable-sync --remote-debugging-port=0 --use-angle=swiftshader --enable-unsafe-swiftshader"
    network = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"
    command = [str(CHROMIUM), *options.split(), network, f"--user-data-dir={profile}", "--window-size=1000,800"]
    with subprocess.Popen([*command, "about:blank"], stderr=subprocess.DEVNULL) as browser:
        try:
            file = profile / "DevToolsActivePort"
            port = wait(lambda: file.is_file() and file.read_text().split()[:1])[0]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
                found = next(t for t in json.load(answer) if t["type"] == "page")
            with connect(found["webSocketDebuggerUrl"], max_size=None) as connection:
                opened = Tab(connection)
                opened.open(url)
                yield opened
        finally:
            browser.terminate()
