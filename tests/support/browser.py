"""A headless Chromium for tests of pages: what it logs, what a script sees in the page, and pictures of it."""

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import pytest

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
# What Blink calls the two schemes.
SCHEMES = {"dark": 0, "light": 1}


@dataclass(frozen=True)
class Visit:
    """What a visit of a page gave: the script's answer, and what the page wrote to the console."""

    answer: dict
    console: list[str]


def find_browser() -> str:
    """The browser; the test that asks is skipped where there is none."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"needs a headless browser on the PATH: one of {', '.join(NAMES)}")
    return found


def visit(page: Path, script: str, *, width: int, height: int, scheme: str, profile: Path) -> Visit:
    """Open a copy of a page in which `script`, the body of a function, runs last and returns an object."""
    answer = f"parent.postMessage(JSON.stringify((() => {{ {script} }})()), '*')"
    wrapped = f"<script>addEventListener('load', () => {{ {answer}; }});</script>"
    profile.mkdir(parents=True, exist_ok=True)
    copy = profile / "page.html"
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", wrapped + "</body>"), encoding="utf-8")
    done = _run(_framed(copy, profile, width, height), profile, width, height, scheme, "--dump-dom")
    found = re.search(r'data-answer="([^"]*)"', done.stdout)
    assert found, f"the page did not answer:\n{done.stderr[-2000:]}"
    return Visit(json.loads(unquote(found[1])), _console(done))


def screenshot(page: Path, picture: Path, *, width: int, height: int, scheme: str, profile: Path) -> list[str]:
    """Take a picture of a page; returns what the page wrote to the console."""
    frame = _framed(page, profile, width, height)
    return _console(_run(frame, profile, width, height, scheme, f"--screenshot={picture}", "--hide-scrollbars"))


def _framed(page: Path, profile: Path, width: int, height: int) -> Path:
    """Write a page that shows another in a frame of `width` x `height`, and keeps what that one posts to it.

    Windows have a least width (500 pixels in some releases), frames have none.
    """
    frame = profile / "frame.html"
    # A frame takes its colour scheme from the page around it.
    frame.write_text(
        '<!doctype html><meta name="color-scheme" content="light dark"><body style="margin: 0"><script>'
        "addEventListener('message', event => {"
        " document.documentElement.dataset.answer = encodeURIComponent(event.data); });</script>"
        f'<iframe src="{page.resolve().as_uri()}" width="{width}" height="{height}" style="border: 0"></iframe>',
        encoding="utf-8",
    )
    return frame


def _console(done: subprocess.CompletedProcess) -> list[str]:
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def _run(page: Path, profile: Path, width: int, height: int, scheme: str, *flags: str) -> subprocess.CompletedProcess:
    command = [
        find_browser(),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        # Whatever a page asks the network for is refused, and that is said on the console.
        "--proxy-server=127.0.0.1:9",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={profile / 'profile'}",
        f"--window-size={width},{height}",
        f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}",
        "--enable-logging=stderr",
        "--virtual-time-budget=4000",
        *flags,
        page.resolve().as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
