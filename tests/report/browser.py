"""A headless Chromium for tests, driven over its own debugging protocol through two pipes: no port, no package."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

_NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome-stable", "google-chrome")


def find_chromium() -> str | None:
    """What KRONLAB_CHROMIUM names, else the first Chromium on PATH."""
    named = os.environ.get("KRONLAB_CHROMIUM")
    return named if named else next((path for name in _NAMES if (path := shutil.which(name))), None)


class Page:
    """One page of a browser of its own.

    Attributes:
        requests: every address that the browser asked for.
        problems: uncaught exceptions, console errors, and what the page's policy refused.
    """

    def __init__(self, path: str | None = None) -> None:
        program = path or find_chromium()
        assert program is not None
        self.requests: list[str] = []
        self.problems: list[str] = []
        self._fired: list[str] = []
        self._profile = tempfile.TemporaryDirectory()
        to_browser, self._in = os.pipe()
        self._out, from_browser = os.pipe()
        arguments = [
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
            "--disable-background-networking", "--remote-debugging-pipe", f"--user-data-dir={self._profile.name}",
            "about:blank",
        ]  # fmt: skip
        redirected = ["bash", "-c", f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}', program, *arguments]
        self._process = subprocess.Popen(redirected, pass_fds=(to_browser, from_browser), stderr=subprocess.DEVNULL)
        os.close(to_browser)
        os.close(from_browser)
        self._buffer, self._number, self._session = b"", 0, ""
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self._session = ""
        with contextlib.suppress(EOFError):
            self.call("Browser.close")
        os.close(self._in)
        os.close(self._out)
        self._process.wait(30)
        self._profile.cleanup()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._in, json.dumps(message).encode() + b"\0")
        wanted = self._number
        while True:
            answer = self._receive()
            if answer.get("id") == wanted:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return dict(answer["result"])
            self._note(answer)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            more = os.read(self._out, 1 << 20)
            if not more:
                raise EOFError("the browser has gone")
            self._buffer += more
        text, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(text))

    def _note(self, event: dict[str, Any]) -> None:
        method, more = event.get("method", ""), event.get("params", {})
        self._fired.append(method)
        if method == "Network.requestWillBeSent":
            self.requests.append(more["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            detail = more["exceptionDetails"]
            self.problems.append(detail.get("exception", {}).get("description") or detail["text"])
        elif method == "Runtime.consoleAPICalled" and more["type"] in ("error", "warning", "assert"):
            self.problems.append(" ".join(str(a.get("value", a.get("description"))) for a in more["args"]))
        elif method == "Log.entryAdded" and more["entry"]["level"] in ("error", "warning"):
            self.problems.append(more["entry"]["text"])

    def open(self, path: Path | str, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Load a file and wait until its scripts have run."""
        self.look(width=width, height=height, dark=dark)
        self._fired.clear()
        self.call("Page.navigate", url=path.resolve().as_uri() if isinstance(path, Path) else path)
        while "Page.loadEventFired" not in self._fired:
            self._note(self._receive())

    def look(self, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """The window's size, and the theme that the system prefers."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def js(self, expression: str) -> Any:
        """The value of an expression; a promise is waited for."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"].get("exception", {}).get("description", expression))
        return answer["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until an expression is true, looked at in every frame; the test's own time limit ends it."""
        self.js(
            "new Promise((done) => { const look = () => "
            f"(({expression}) ? done(true) : setTimeout(look, 20)); look(); }})"
        )

    def press(self, key: str, code: int, text: str = "") -> None:
        """A key, e.g. press("Tab", 9)."""
        common = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", **common, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def screenshot(self, path: Path) -> Path:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
        return path
