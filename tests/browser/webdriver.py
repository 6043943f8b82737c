"""A headless Chromium, driven through chromedriver's HTTP interface (W3C WebDriver); only the standard library."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
MISSING = "" if CHROMIUM and DRIVER else "needs chromium and chromedriver (Debian: chromium chromium-driver)"
_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars"
)

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever proxy the environment names


class Browser:
    """One tab."""

    def __init__(self, url: str) -> None:
        self._url = url

    def open(self, page: Path) -> None:
        self._call("POST", "/url", {"url": page.resolve().as_uri()})

    def resize(self, width: int, height: int = 900) -> None:
        """The size of the page's window in CSS pixels, however small."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._devtools("Emulation.setDeviceMetricsOverride", size)

    def emulate(self, *, dark: bool = False, print_: bool = False) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        media = {"media": "print" if print_ else "screen", "features": [scheme]}
        self._devtools("Emulation.setEmulatedMedia", media)

    def scripts(self, enabled: bool) -> None:
        """Whether pages that are opened from now on may run their scripts."""
        self._devtools("Emulation.setScriptExecutionDisabled", {"value": not enabled})

    def run(self, script: str, *arguments: Any) -> Any:
        """The value that a JavaScript function body returns."""
        return self._call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def console(self) -> list[str]:
        """What the page complained of since the last call."""
        return [entry["message"] for entry in self._call("POST", "/se/log", {"type": "browser"})]

    def screenshot(self, path: Path) -> None:
        """The whole page."""
        found = self._devtools("Page.captureScreenshot", {"captureBeyondViewport": True, "format": "png"})
        path.write_bytes(base64.b64decode(found["data"]))

    def pdf(self) -> bytes:
        """As it would be printed on A4."""
        self._devtools("Emulation.setEmulatedMedia", {"media": ""})
        page = {"width": 21.0, "height": 29.7}
        return base64.b64decode(self._call("POST", "/print", {"page": page, "background": True}))

    def _devtools(self, command: str, parameters: dict[str, Any]) -> Any:
        return self._call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with _DIRECT.open(request, timeout=60) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{method} {path}: {error.read().decode()[:500]}") from error


@contextmanager
def browser() -> Iterator[Browser]:
    """A fresh browser with a profile of its own; both processes end with the block."""
    assert CHROMIUM and DRIVER, MISSING
    with TemporaryDirectory() as folder:
        driver = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            assert driver.stdout is not None
            port = next(found[1] for line in driver.stdout if (found := re.search(r"successfully on port (\d+)", line)))
            root = Browser(f"http://127.0.0.1:{port}")
            options = {"binary": CHROMIUM, "args": [*_FLAGS.split(), f"--user-data-dir={folder}"]}
            wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            session = root._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
            tab = Browser(f"{root._url}/session/{session}")
            try:
                yield tab
            finally:
                tab._call("DELETE", "")
        finally:
            driver.terminate()
            driver.wait(30)
