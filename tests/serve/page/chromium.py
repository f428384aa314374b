"""A small client of Chromium's DevTools protocol, over a pair of pipes: it needs nothing but the browser."""

from __future__ import annotations

import base64
import json
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAM = "/usr/bin/chromium"
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
)
KEYS = {"Tab": 9, "Enter": 13, "End": 35, "Home": 36, "ArrowUp": 38, "ArrowDown": 40, "ArrowRight": 39, " ": 32}
TEXTS = {"Enter": "\r", " ": " "}
AT_MOST_S = 30.0


class Browser:
    """A Chromium that runs without a window.

    Parameters
    ----------
    profile
        A new folder for its profile.
    """

    def __init__(self, profile: Path) -> None:
        from_browser, browser_writes = os.pipe()
        browser_reads, to_browser = os.pipe()
        null = os.open(os.devnull, os.O_RDWR)
        copies = [(browser_reads, 3), (browser_writes, 4), (null, 1), (null, 2)]
        # Numbers above those that are given away, or one copy could replace another before it is copied.
        copies = [(fd, target) for fd, target in ((_high(fd), target) for fd, target in copies)]
        self._pid = os.posix_spawn(
            PROGRAM,
            [PROGRAM, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, fd, target) for fd, target in copies],
            setpgroup=0,
        )
        for fd in {browser_reads, browser_writes, null, *(fd for fd, _ in copies)}:
            os.close(fd)
        self._write = os.fdopen(to_browser, "wb", buffering=0)
        self._read = os.fdopen(from_browser, "rb")
        self._number = 0
        self._answers: dict[int, queue.Queue[dict[str, Any]]] = {}
        self.pages: dict[str, Page] = {}
        self._thread = threading.Thread(target=self._receive, name="echoquad-test-chromium", daemon=True)
        self._thread.start()

    def _receive(self) -> None:
        data = b""
        while piece := self._read.read1(1 << 20):
            *messages, data = (data + piece).split(b"\0")
            for message in map(json.loads, messages):
                if (number := message.get("id")) in self._answers:
                    self._answers.pop(number).put(message)
                elif page := self.pages.get(message.get("sessionId", "")):
                    page.happened(message["method"], message["params"])

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        self._number += 1
        self._answers[self._number] = answer = queue.Queue()
        message = {"id": self._number, "method": method, "params": parameters}
        self._write.write(
            json.dumps(message if session is None else {**message, "sessionId": session}).encode() + b"\0"
        )
        answered = answer.get(timeout=AT_MOST_S)
        assert "error" not in answered, (method, answered)
        return dict(answered["result"])

    def page(self) -> Page:
        """Return a new, empty page with a browser context of its own."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self.pages[session] = Page(self, session, target)
        for domain in ("Page", "Runtime", "Log", "Network", "DOM", "Audits", "Performance", "Accessibility"):
            page.call(f"{domain}.enable")
        return page

    def close(self) -> None:
        """End the browser and its processes."""
        try:
            self.call("Browser.close")
        except (AssertionError, OSError, queue.Empty):
            os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        self._write.close()
        self._thread.join(AT_MOST_S)
        self._read.close()


def _high(fd: int) -> int:
    import fcntl

    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 20)


class Page:
    """A page, with everything that went wrong in it.

    Attributes
    ----------
    faults
        Errors and warnings of the console, exceptions, and violations of the Content-Security-Policy.
    requests
        The addresses of all requests.
    """

    def __init__(self, browser: Browser, session: str, target: str) -> None:
        self._browser, self._session, self._target = browser, session, target
        self.faults: list[str] = []
        self.requests: list[str] = []

    def happened(self, method: str, event: dict[str, Any]) -> None:
        """Record an event of the protocol."""
        if method == "Network.requestWillBeSent":
            self.requests.append(event["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.faults.append(json.dumps(event["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and event["type"] in ("error", "warning", "assert"):
            self.faults.append(json.dumps(event["args"]))
        elif method == "Log.entryAdded" and event["entry"]["level"] in ("error", "warning"):
            self.faults.append(f"{event['entry']['text']} {event['entry'].get('url', '')}")
        elif method == "Audits.issueAdded":
            self.faults.append(json.dumps(event["issue"]))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol for this page and return its result."""
        return self._browser.call(method, self._session, **parameters)

    def open(self, address: str, width: int = 1280, height: int = 800, scale: float = 1.0, **features: str) -> None:
        """Open an address in a viewport of this size, with these media features."""
        media = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.call("Emulation.setEmulatedMedia", features=media)
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )
        self.call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def evaluate(self, expression: str) -> Any:
        """Return the value of an expression in the page; a promise is awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression: str, timeout: float = 60.0) -> float:
        """Wait until an expression is true, and return the seconds that it took."""
        start = time.monotonic()
        while not self.evaluate(f"Boolean({expression})"):
            assert time.monotonic() - start < timeout, f"{expression} is not true:\n{self.text()}"
            time.sleep(0.02)
        return time.monotonic() - start

    def text(self, selector: str = "body") -> str:
        """Return the text of an element as it is shown."""
        return str(self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText"))

    def choose(self, *paths: Path, selector: str = "#files") -> None:
        """Choose files in a file input."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path) for path in paths])

    def drop(self, *paths: Path, x: int = 640, y: int = 400) -> None:
        """Drag files into the page and drop them there."""
        data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def press(self, key: str, *, shift: bool = False) -> None:
        """Press a key and release it."""
        code = {"key": key, "windowsVirtualKeyCode": KEYS[key], "modifiers": 8 if shift else 0}
        text = {"text": TEXTS[key]} if key in TEXTS else {}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **code, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **code)

    def click(self, selector: str) -> None:
        """Click into the middle of an element."""
        name = json.dumps(selector)
        box = self.evaluate(
            f"(() => {{const e = document.querySelector({name}); e.scrollIntoView({{block: 'center'}});"
            "const {x, y, width, height} = e.getBoundingClientRect(); return [x + width / 2, y + height / 2]})()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def focused(self) -> str:
        """Return the id, or else the text, of the element that has the focus."""
        return str(self.evaluate("document.activeElement.id || document.activeElement.innerText"))

    def names(self) -> set[tuple[str, str]]:
        """Return role and name of every node of the accessibility tree that a screen reader presents."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        return {(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"]}

    def heap(self) -> float:
        """Return the MiB of the JavaScript heap after a garbage collection."""
        self.call("HeapProfiler.collectGarbage")
        metrics = {one["name"]: one["value"] for one in self.call("Performance.getMetrics")["metrics"]}
        return float(metrics["JSHeapUsedSize"]) / 2**20

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """Write a picture of the viewport, or of the whole page, as PNG."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))

    def forget(self, *texts: str) -> None:
        """Forget the faults with one of these texts, which a test expects; there must be one."""
        known = [fault for fault in self.faults if any(text in fault for text in texts)]
        assert known, self.faults
        self.faults = [fault for fault in self.faults if fault not in known]

    def close(self) -> None:
        """Close the page."""
        if self._browser.pages.pop(self._session, None):
            self._browser.call("Target.closeTarget", targetId=self._target)


@contextmanager
def running(profile: Path) -> Iterator[Callable[[], Page]]:
    """Yield a function that opens a page in a browser, which ends with the context."""
    browser = Browser(profile)
    try:
        yield browser.page
    finally:
        browser.close()
