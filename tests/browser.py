"""A headless Chromium for tests and benchmarks of the HTML report; whoever asks without one is told what to install."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
MISSING = "no headless browser: apt-get install -y chromium chromium-driver"
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


def browser_paths() -> tuple[str, str] | None:
    """(browser, driver) of this machine, or None."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


@contextlib.contextmanager
def open_browser(*, width: int = 1360, height: int = 900) -> Iterator[Any]:
    """A Selenium driver on an empty profile that logs the console; closed and forgotten at the end."""
    from selenium import webdriver

    paths = browser_paths()
    if paths is None:
        raise RuntimeError(MISSING)
    with tempfile.TemporaryDirectory(prefix="mecharule_browser_") as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = paths[0]
        for flag in (*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=paths[1]))
        try:
            yield driver
        finally:
            driver.quit()


def wait_for(driver: Any, found: Callable[[Any], Any], timeout: float = 60.0) -> Any:
    """First true value of `found(driver)`; the browser hands some events on a moment after what caused them."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, timeout, poll_frequency=0.02).until(found)


def open_report(driver: Any, path: Path) -> float:
    """Open a page and wait until its script has finished; milliseconds from the start of loading until then."""
    driver.get(path.resolve().as_uri())
    ready = "return document.documentElement.dataset.ready === 'yes'"
    wait_for(driver, lambda page: page.execute_script(ready))
    return driver.execute_script("return performance.now()")


def console(driver: Any) -> list[str]:
    """What the page has written to the console since the last call: errors, warnings, refused requests."""
    return [entry["message"] for entry in driver.get_log("browser")]
