"""A headless Chromium, driven through its DevTools protocol."""

import base64
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import pytest
from websockets.sync.client import ClientConnection, connect

START_TIMEOUT_S = 60.0
CALL_TIMEOUT_S = 60.0
FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-extensions",
    "--disable-background-networking", "--remote-debugging-port=0", "about:blank",
]  # fmt: skip
KEY_CODES = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowRight": 39, "ArrowLeft": 37, "End": 35, "Home": 36}
CTRL, SHIFT = 2, 8


@contextmanager
def chromium(profile: Path) -> Iterator["Page"]:
    """A page of a new Chromium; skips the test where there is no Chromium."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium on this machine (chromium, chromium-browser or google-chrome in PATH)")
    with (profile / "chromium.log").open("wb") as log:
        process = subprocess.Popen([program, f"--user-data-dir={profile}", *FLAGS], stdout=log, stderr=log)
    try:
        port_file = profile / "DevToolsActivePort"
        wait_until(lambda: port_file.is_file() and len(port_file.read_text().split()) == 2, START_TIMEOUT_S)
        port, path = port_file.read_text().split()
        with connect(f"ws://127.0.0.1:{port}{path}", max_size=None) as socket:
            yield Page.attach(socket)
    finally:
        process.terminate()
        process.wait(20)


def wait_until(condition: Callable[[], Any], timeout_s: float = CALL_TIMEOUT_S) -> Any:
    """Polls until ``condition`` gives something true, and returns that."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise TimeoutError(f"nothing true within {timeout_s:g} s")


class Page:
    """One tab; ``problems`` are its console errors, uncaught exceptions and security violations."""

    def __init__(self, socket: ClientConnection, session: str | None) -> None:
        self._socket, self._session, self._ids = socket, session, itertools.count(1)
        self.problems: list[str] = []

    @classmethod
    def attach(cls, socket: ClientConnection) -> Self:
        """Attaches to the browser's first tab."""
        browser = cls(socket, None)
        targets = browser.call("Target.getTargets")["targetInfos"]
        target = next(entry["targetId"] for entry in targets if entry["type"] == "page")
        page = cls(socket, browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.call("Emulation.setFocusEmulationEnabled", enabled=True)
        return page

    def call(self, method: str, **params: Any) -> Any:
        """One command of the protocol."""
        number = next(self._ids) + (0 if self._session is None else 10_000)
        message = {"id": number, "method": method, "params": params}
        self._socket.send(json.dumps(message | ({"sessionId": self._session} if self._session else {})))
        while True:
            reply = json.loads(self._socket.recv(CALL_TIMEOUT_S))
            if reply.get("id") == number:
                if "error" in reply:
                    raise RuntimeError(f"{method}: {reply['error']['message']}")
                return reply["result"]
            self._note(reply)

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        if event.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.problems.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        elif event.get("method") == "Runtime.exceptionThrown":
            self.problems.append(params["exceptionDetails"].get("exception", {}).get("description", "exception"))
        elif event.get("method") == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            self.problems.append(str([value.get("value") for value in params["args"]]))

    def open(self, url: str) -> None:
        """Loads an address."""
        self.call("Page.navigate", url=url)
        wait_until(lambda: self.evaluate("document.readyState") == "complete")

    def evaluate(self, expression: str) -> Any:
        """Value of a JavaScript expression; a promise is awaited."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{expression}: {result['exceptionDetails']['exception'].get('description')}")
        return result["result"].get("value")

    def wait(self, expression: str, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """Polls an expression until it is true."""
        return wait_until(lambda: self.evaluate(expression), timeout_s)

    def fill(self, selector: str, value: str | bool) -> None:
        """Sets a field as a user would, events included."""
        self.evaluate(
            f"""(() => {{
                const field = document.querySelector({json.dumps(selector)});
                field[typeof {json.dumps(value)} === "boolean" ? "checked" : "value"] = {json.dumps(value)};
                for (const name of ["input", "change"]) field.dispatchEvent(new Event(name, {{ bubbles: true }}));
            }})()"""
        )

    def click(self, selector: str) -> None:
        """Clicks an element."""
        self.evaluate(f"document.querySelector({json.dumps(selector)}).click()")

    def press(self, key: str, modifiers: int = 0) -> None:
        """Presses and releases a key."""
        code = KEY_CODES[key]
        common = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **common, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text: str) -> None:
        """Types into the element that has the focus."""
        self.call("Input.insertText", text=text)

    def screen(self, width: int, height: int, *, dark: bool = False, scale: float = 1) -> None:
        """Sets size and colour scheme of the screen."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path) -> None:
        """Writes what is on the screen as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
