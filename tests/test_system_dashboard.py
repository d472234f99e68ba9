"""
The dashboard in a real browser: Debian's chromium, driven by selenium.

With STRICTPROXY_SCREENSHOTS=FOLDER, what a person would see is saved there.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import urllib.request
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.common.by import By
from twisted.trial.unittest import SkipTest

from tests.test_system import SystemTestCase, free_port

NEEDED = ("chromium", "chromedriver")
SCREENSHOTS = os.environ.get("STRICTPROXY_SCREENSHOTS")


class DashboardTests(SystemTestCase):
    def setUp(self) -> None:
        super().setUp()
        missing = [name for name in NEEDED if not shutil.which(name)]
        if missing:
            raise SkipTest(f"not installed (Debian's packages): {', '.join(missing)}")

    def browser(self, *, dark: bool = False, width: int = 1280, height: int = 900) -> Any:
        options = webdriver.ChromeOptions()
        for argument in (
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--disable-background-networking", "--disable-component-update", "--no-first-run",
            f"--window-size={width},{height}", "--force-device-scale-factor=1",
            f"--user-data-dir={self.folder / f'profile-{width}-{dark}'}",
        ):  # fmt: skip
            options.add_argument(argument)
        if dark:
            options.add_argument("--blink-settings=preferredColorScheme=0")
        options.binary_location = shutil.which("chromium") or ""
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        service = webdriver.ChromeService(shutil.which("chromedriver"))
        driver = webdriver.Chrome(options=options, service=service)
        self.addCleanup(driver.quit)
        driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia",
            {"features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]},
        )
        if width < 600:
            driver.execute_cdp_cmd(
                "Emulation.setDeviceMetricsOverride",
                {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": True},
            )
        return driver

    def count(self, driver: Any, selector: str) -> int:
        return len(driver.find_elements(By.CSS_SELECTOR, selector))

    def figure(self, driver: Any, name: str) -> str:
        text: str = driver.find_element(By.CSS_SELECTOR, f"[data-figure={name}]").text
        return text

    def shoot(self, driver: Any, name: str) -> None:
        if SCREENSHOTS:
            Path(SCREENSHOTS).mkdir(parents=True, exist_ok=True)
            driver.save_screenshot(str(Path(SCREENSHOTS) / f"dashboard-{name}.png"))

    def test_dashboard(self) -> None:
        """Slots fill and empty, the line grows and shrinks, drain works; nothing leaves."""
        port = free_port("0.0.0.0")
        hosts = [f"127.0.5.{n + 1}" for n in range(4)]
        self.uvicorns(hosts, port)
        token = self.folder / "token"
        token.write_text("secret")
        tasks = self.folder / "tasks"
        tasks.mkdir()
        static = ", ".join(f'"{host}:{port}"' for host in hosts)
        self.twistd(
            f"upstreams:\n  transcode: {{static: [{static}], limit: 3}}\n"
            "routes:\n  - {prefix: /, upstream: transcode, detach: true}\n"
            f"tasks: {{directory: {tasks}}}\n"
        )
        # With a token now, as an operator would change it.
        path = self.folder / "strictproxy.yaml"
        admin = f"tcp:{self.admin}:interface=127.0.0.1"
        path.write_text(
            path.read_text().replace(
                f"admin: {admin}", f"admin: {{endpoint: '{admin}', token_file: {token}}}"
            )
        )
        self.wait_for(
            lambda: "configuration read again" in (self.folder / "strictproxy.log").read_text(),
            "the token is in force",
        )
        driver = self.browser()
        driver.get(f"http://127.0.0.1:{self.admin}/")
        self.wait_for(lambda: self.count(driver, ".pod.ready") == 4, "four pods are shown")
        self.assertEqual(self.count(driver, ".slots i"), 12)
        self.assertEqual(self.count(driver, ".slots i.busy"), 0)
        load = self.spawn(
            "hey", "-z", "60s", "-c", "40", "-t", "20", f"{self.url}/job", log="hey.txt"
        )
        self.wait_for(lambda: self.count(driver, ".slots i.busy") == 12, "every slot is busy")
        self.wait_for(lambda: int(self.figure(driver, "waiting")) >= 20, "the line has grown")
        self.wait_for(lambda: float(self.figure(driver, "rate")) > 50, "answers are counted")
        driver.find_element(By.TAG_NAME, "summary").click()
        self.wait_for(lambda: self.count(driver, "tbody tr") > 20, "the line is listed")
        driver.find_element(By.TAG_NAME, "summary").click()
        self.shoot(driver, "light")
        for name, dark, width in (("dark", True, 1280), ("phone", False, 390)):
            other = self.browser(dark=dark, width=width)
            other.get(f"http://127.0.0.1:{self.admin}/")
            self.wait_for(lambda other=other: self.count(other, ".slots i.busy") == 12, name)
            wide = other.execute_script(
                "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
            )
            self.assertEqual(wide, 0, f"{name}: it has to be scrolled sideways")
            self.shoot(other, name)
            self.check_quiet(other)
        driver.find_element(By.ID, "controls").click()
        driver.find_element(By.ID, "token").send_keys("secret\n")
        self.wait_for(lambda: self.count(driver, ".pod button:not([hidden])") == 4, "controls")
        driver.find_element(By.CSS_SELECTOR, ".pod button").click()
        self.wait_for(lambda: self.count(driver, ".pod.drained") == 1, "a pod is drained")
        self.wait_for(lambda: self.count(driver, ".slots i.busy") == 9, "it has emptied")
        self.shoot(driver, "controls")
        limit = driver.find_element(By.CSS_SELECTOR, ".change input")
        limit.clear()
        limit.send_keys("2\n")
        self.wait_for(lambda: self.count(driver, ".slots i") == 8, "the limit is two")
        self.assertEqual(self.state()["transcode"]["limit"], 2)
        driver.find_element(By.CSS_SELECTOR, ".pod.drained button").click()
        self.wait_for(lambda: self.count(driver, ".pod.ready") == 4, "it takes requests again")
        load.send_signal(signal.SIGINT)
        load.wait(30)
        self.wait_for(lambda: self.count(driver, ".slots i.busy") == 0, "every slot is free")
        self.wait_for(lambda: self.figure(driver, "waiting") == "0", "the line is empty")
        self.check_task(driver)
        self.check_quiet(driver)
        self.measure(driver)

    def check_task(self, driver: Any) -> None:
        """A detached request is seen in the line by the beginning of its id."""

        def pause(paused: bool) -> None:
            call = urllib.request.Request(
                f"http://127.0.0.1:{self.admin}/api/v1/upstreams/transcode",
                json.dumps({"paused": paused}).encode(),
                {"Authorization": "Bearer secret"},
                method="PATCH",
            )
            urllib.request.urlopen(call, timeout=10).close()

        pause(True)
        call = urllib.request.Request(
            f"{self.url}/job", b"work", {"Prefer": "respond-async"}, method="POST"
        )
        with urllib.request.urlopen(call, timeout=10) as answer:
            location = answer.headers["Location"]
        short = location.rpartition("/")[2][:8]
        driver.find_element(By.TAG_NAME, "summary").click()
        self.wait_for(
            lambda: short in driver.find_element(By.TAG_NAME, "tbody").text, "the task is listed"
        )
        self.shoot(driver, "task")
        pause(False)
        self.wait_for(lambda: not self.count(driver, "tbody tr"), "its turn has come")

    def check_quiet(self, driver: Any) -> None:
        """No error on the console, and no request to anywhere else."""
        severe = [each for each in driver.get_log("browser") if each["level"] == "SEVERE"]
        self.assertEqual(severe, [])
        asked = set()
        for entry in driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                asked.add(message["params"]["request"]["url"])
        own = f"http://127.0.0.1:{self.admin}/"
        self.assertEqual([url for url in asked if not url.startswith((own, "data:", "chrome"))], [])
        self.assertIn(f"{own}api/v1/events", asked)

    def measure(self, driver: Any) -> None:
        """Print what a thousand pods and ten thousand waiting cost to draw."""
        took = driver.execute_script(
            """
            const pods = (n) => Array.from({length: 1000}, (_, i) =>
              [`10.0.${i >> 8}.${i & 255}:80`, (i + n) % 3, 2, "ready", null]);
            const times = [];
            for (let n = 0; n < 10; n++) {
              const began = performance.now();
              draw({time: 1e9 + n, outcomes: {}, errors: [], stopping: false,
                reload_error: null, upstreams: {
                big: {trusted: true, paused: false, waiting: 10000, oldest: 9, running: 2000,
                  slots: 2000, limit: 2, requests: n * 500, failures: 0, pods: pods(n),
                  discovery: null}}});
              document.body.getBoundingClientRect();
              times.push(performance.now() - began);
            }
            return times;
            """
        )
        again = sorted(took[1:])
        print(
            f"\n1,000 pods: first drawn in {took[0]:.0f} ms, then {again[len(again) // 2]:.0f} ms"
        )
