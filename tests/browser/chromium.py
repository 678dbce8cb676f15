"""A headless Chromium, driven through its DevTools protocol.

Chromium reads JSON messages from its file descriptor 3 and writes to 4, each ended by a zero byte
(`--remote-debugging-pipe`), so no port is opened and no library is needed. The protocol is described at
chromedevtools.github.io/devtools-protocol.
"""

import base64
import fcntl
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

TIMEOUT_S = 60.0
"""Longest wait for one answer or event."""

FLAGS = (
    *("--headless=new", "--remote-debugging-pipe", "--no-first-run", "--no-default-browser-check", "--disable-gpu"),
    *("--disable-dev-shm-usage", "--disable-extensions", "--disable-background-networking", "--disable-sync"),
    *("--mute-audio", "--host-resolver-rules=MAP * ~NOTFOUND"),
)
"""Without network: names lead nowhere."""

ON_PIPES = (
    "import os; from sys import argv; os.dup2(int(argv[1]), 3); os.dup2(int(argv[2]), 4); os.execv(argv[3], argv[3:])"
)
"""Puts two descriptors where Chromium expects them, then becomes Chromium."""

KEYS = {"Enter": 13, "Escape": 27, "Tab": 9, " ": 32}
"""Key codes of the keys that tests press."""


class Chromium:
    """The browser, for as long as the block lasts."""

    def __init__(self, program: str, profile: Path) -> None:
        commands, self._write = os.pipe()
        self._read, answers = os.pipe()
        # Above 4, so that neither lies where the other is to go.
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (commands, answers)]
        words = [program, *FLAGS, f"--user-data-dir={profile}", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
        self._process = subprocess.Popen(
            [sys.executable, "-c", ON_PIPES, *map(str, high), *words],
            pass_fds=high,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for fd in (commands, answers, *high):
            os.close(fd)
        self._buffer = b""
        self._num_sent = 0
        self.events: list[dict[str, Any]] = []
        """What the browser said unasked, oldest first."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._write)  # it ends when its commands do
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._read)

    def call(self, method: str, session: str = "", **params: Any) -> dict[str, Any]:
        """The answer to a command; `RuntimeError` with the browser's own words where it refuses."""
        self._num_sent += 1
        message = {"id": self._num_sent, "method": method, "params": params}
        data = json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        while (answer := self._next()).get("id") != self._num_sent:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def wait_for(self, method: str, session: str) -> dict[str, Any]:
        """The next event of that name, which is taken off the list."""
        while True:
            for place, event in enumerate(self.events):
                if event.get("method") == method and event.get("sessionId") == session:
                    return self.events.pop(place)["params"]
            self.events.append(self._next())

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + TIMEOUT_S
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(self._read, 1 << 20) if ready else b""
            if not data:
                raise RuntimeError(f"Chromium said nothing for {TIMEOUT_S:g} s, or ended: {self._process.poll()}")
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


class Tab:
    """One page in the browser."""

    def __init__(self, browser: Chromium) -> None:
        self._browser = browser
        self._target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        attached = browser.call("Target.attachToTarget", targetId=self._target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **params)

    def close(self) -> None:
        self._browser.call("Target.closeTarget", targetId=self._target)

    def show(self, path: Path, width: int, height: int = 900, dark: bool = False) -> None:
        """Open a file as a screen of that width sees it, and wait until all of it is there."""
        self.resize(width, height)
        self.prefer("dark" if dark else "light")
        self.call("Page.navigate", url=path.resolve().as_uri())
        self._browser.wait_for("Page.loadEventFired", self._session)
        self.run("document.fonts.ready.then(() => true)")

    def resize(self, width: int, height: int = 900) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 640
        )

    def prefer(self, scheme: str) -> None:
        """The colour scheme that the reader's system asks for: light or dark."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; of a promise, what it comes to."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release a key."""
        about = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": KEYS[key]}
        text = {"Enter": "\r", " ": " "}.get(key)
        self.call("Input.dispatchKeyEvent", type="keyDown", **about, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def click(self, script: str) -> None:
        """Click the middle of the element that a JavaScript expression gives, as a mouse does."""
        place = self.run(
            f"(e => {{ e.scrollIntoView({{block: 'center', behavior: 'instant'}}); const b = e.getBoundingClientRect();"
            f" return [b.x + b.width / 2, b.y + b.height / 2]; }})({script})"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    def screenshot(self, path: Path, whole: bool = True) -> None:
        """Save what is seen as PNG, or the whole page."""
        clip: dict[str, Any] = {}
        if whole:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            # Larger pictures come back empty.
            clip = {"clip": {**size, "height": min(size["height"], 16_000), "scale": 1}, "captureBeyondViewport": True}
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", **clip)["data"]))

    def pdf(self) -> bytes:
        """The page as it is printed."""
        data = self.call("Page.printToPDF", preferCSSPageSize=True, printBackground=False)["data"]
        return base64.b64decode(data)

    @property
    def complaints(self) -> list[str]:
        """What the console has said: errors, warnings, and what the page's policy forbade."""
        self.run("0")  # what was said before has come by then
        found = []
        for event in self._own("Log.entryAdded"):
            found.append(f"{event['entry']['source']}: {event['entry']['text']}")
        for event in self._own("Runtime.consoleAPICalled"):
            found.append(f"console: {event['args']}")
        for event in self._own("Runtime.exceptionThrown"):
            found.append(f"exception: {event['exceptionDetails']}")
        return found

    @property
    def asked_for(self) -> list[str]:
        """Addresses that the page asked for, data inside it left out."""
        urls = [event["request"]["url"] for event in self._own("Network.requestWillBeSent")]
        return [url for url in urls if not url.startswith("data:")]

    def _own(self, method: str) -> list[dict[str, Any]]:
        events = self._browser.events
        return [e["params"] for e in events if e.get("method") == method and e.get("sessionId") == self._session]
