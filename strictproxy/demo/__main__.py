"""
The demo: the same bursty load twice, spread at random and through strictproxy.

Exits 0 only if every promise that can be seen from here was kept.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from twisted.internet.defer import Deferred
from twisted.internet.error import CannotListenError
from twisted.internet.protocol import ProcessProtocol
from twisted.internet.task import LoopingCall, deferLater, react
from twisted.python.failure import Failure
from twisted.web.client import Agent

from strictproxy.demo.dns_server import DnsServer
from strictproxy.demo.load import Outcome, ideal_makespan, plan, run_load
from strictproxy.demo.pods import Pod

NAME = "jobs.demo.svc.cluster.local"
LIMIT = 2
PODS = 4
JOBS = 112
MEAN_SECONDS = 0.9
#: When one pod leaves and another comes, seconds into a run.
CHANGE_AT = 1.0
#: A pod that left discovery goes on for so long, as in its grace period.
GRACE = 7.0
MAKESPAN_BOUND = 1.05


class Proxy(ProcessProtocol):
    """The proxy's process; what it writes goes to a file."""

    def __init__(self, log: Path) -> None:
        self.ended: Deferred[None] = Deferred()
        self._log = log.open("wb")

    def outReceived(self, data: bytes) -> None:
        """Keep its log."""
        self._log.write(data)
        self._log.flush()

    errReceived = outReceived

    def processEnded(self, reason: Failure) -> None:
        """Note its end."""
        self._log.close()
        self.ended.callback(None)


class Demo:
    """Everything that runs, and what is known about it."""

    def __init__(self, reactor: Any, console: Console) -> None:
        self.reactor = reactor
        self.console = console
        self.folder = Path(tempfile.mkdtemp(prefix="strictproxy-demo-"))
        self.dns = DnsServer(reactor)
        self.pods = [Pod(reactor, f"127.0.0.{11 + n}", LIMIT) for n in range(PODS + 1)]
        self.in_dns: list[Pod] = []
        self.port = 0
        self.proxy_address = ""
        self.admin_address = ""

    # -- setting up

    def start_pods(self) -> None:
        """Start all pods but the last on one port, as in a Deployment, and publish them."""
        *first, _ = self.pods
        self.port = first[0].start(0)
        for pod in first[1:]:
            pod.start(self.port)
        self.publish(first)

    def publish(self, pods: list[Pod]) -> None:
        """Let the name resolve to `pods`."""
        self.in_dns = pods
        self.dns.zone.records[NAME] = [pod.host for pod in pods]

    async def start_proxy(self) -> Proxy:
        """Run the real thing, and wait until it is ready."""
        listen, admin = _free_port(self.reactor), _free_port(self.reactor)
        self.proxy_address, self.admin_address = f"127.0.0.1:{listen}", f"127.0.0.1:{admin}"
        config = self.folder / "strictproxy.yaml"
        config.write_text(
            f"""\
listen: tcp:{listen}:interface=127.0.0.1
admin: tcp:{admin}:interface=127.0.0.1
upstreams:
  jobs:
    dns: {{name: {NAME}, port: {self.port}, servers: ["127.0.0.1:{self.dns.port}"]}}
    limit: {LIMIT}
routes:
  - {{path: /job, upstream: jobs}}
""",
            encoding="utf-8",
        )
        protocol = Proxy(self.folder / "strictproxy.log")
        arguments = ["-m", "twisted", "strictproxy", "--config", str(config)]
        process = self.reactor.spawnProcess(
            protocol, sys.executable, [sys.executable, *arguments], env=dict(os.environ)
        )
        self.reactor.addSystemEventTrigger("before", "shutdown", _end, process, protocol)
        agent = Agent(self.reactor)
        for _ in range(200):
            try:
                answer = await agent.request(b"GET", f"http://{self.admin_address}/readyz".encode())
                if answer.code == 200:
                    return protocol
            except Exception:
                if protocol.ended.called:
                    break
            await deferLater(self.reactor, 0.1)
        raise SystemExit(f"the proxy did not become ready; see {self.folder}/strictproxy.log")

    # -- one run

    async def run(self, title: str, choose: Callable[[], str]) -> Outcome:
        """Send the load while one pod goes and another comes; show how it goes."""
        for pod in self.pods:
            pod.forget()
        first, leaver, newcomer = self.pods[:PODS], self.pods[1], self.pods[PODS]
        newcomer.start(self.port)
        outcome = Outcome()
        change = self.reactor.callLater(
            CHANGE_AT, self.publish, [pod for pod in self.pods if pod is not leaver]
        )
        jobs = plan(JOBS, MEAN_SECONDS, seed=7)
        with Live(console=self.console, refresh_per_second=8, transient=True) as live:

            def show() -> None:
                live.update(self.progress(title, outcome))
                if not self.console.is_terminal and int(self.reactor.seconds() * 4) % 8 == 0:
                    running = sum(pod.running for pod in self.pods)
                    self.console.print(f"{title}: {outcome.done}/{JOBS} done, {running} running")

            ticker = LoopingCall(show)
            ticker.clock = self.reactor
            ticker.start(0.25)
            await run_load(self.reactor, jobs, choose, outcome)
            ticker.stop()
        if change.active():
            change.cancel()
        await newcomer.stop()
        self.publish(first)
        return outcome

    def progress(self, title: str, outcome: Outcome) -> Table:
        """Draw what every pod is doing."""
        table = Table(title=f"{title}: {outcome.done}/{JOBS} done", min_width=64)
        for heading in ("pod", "slots", "waiting in the pod", "served", ""):
            table.add_column(heading)
        for pod in self.pods:
            slots = "■" * pod.running + "□" * (LIMIT - pod.running)
            inside = pod.in_flight - pod.running
            note = "" if pod in self.in_dns else "not in DNS"
            table.add_row(pod.host, slots, "▒" * min(inside, 40), str(pod.served), note)
        in_pods = sum(pod.in_flight for pod in self.pods)
        table.caption = f"waiting outside the pods: {outcome.sent - outcome.done - in_pods}"
        return table


def _free_port(reactor: Any) -> int:
    from twisted.internet.protocol import Factory

    port = reactor.listenTCP(0, Factory(), interface="127.0.0.1")
    number: int = port.getHost().port
    port.stopListening()
    return number


def _end(process: Any, protocol: Proxy) -> Deferred[None]:
    if not protocol.ended.called:
        process.signalProcess("TERM")
    return protocol.ended


async def demo(reactor: Any) -> None:
    """Run everything, print the table, and say what was kept."""
    console = Console(width=None if sys.stdout.isatty() else 100)
    show = Demo(reactor, console)
    try:
        show.start_pods()
    except CannotListenError as error:
        raise SystemExit(f"the demo needs the addresses 127.0.0.11 to .15: {error}") from None
    show.dns.start()
    console.print(
        f"{PODS} pods, {LIMIT} slots each, {JOBS} jobs in 3 bursts; after {CHANGE_AT:g} s "
        f"{show.pods[1].host} leaves and {show.pods[PODS].host} comes."
    )

    def at_random() -> str:
        return f"{random.choice(show.in_dns).host}:{show.port}"

    random.seed(7)
    spread = await show.run("at random, as kube-proxy does", at_random)
    spread_pods = [(pod.served, pod.most_in_flight) for pod in show.pods]
    console.print("starting strictproxy; it trusts an address set after five equal answers ...")
    await show.start_proxy()
    strict = await show.run("through strictproxy", lambda: show.proxy_address)
    strict_pods = [(pod.served, pod.most_in_flight) for pod in show.pods]
    ideal = ideal_makespan(plan(JOBS, MEAN_SECONDS, seed=7), PODS * LIMIT)

    console.print(result_table(show, ideal, (spread, spread_pods), (strict, strict_pods)))
    promises = {
        f"no pod ever had more than {LIMIT} in flight": all(m <= LIMIT for _, m in strict_pods),
        f"makespan at most {MAKESPAN_BOUND} x ideal": strict.makespan <= MAKESPAN_BOUND * ideal,
        "nothing was lost while a pod went and another came": (
            not strict.errors and strict.done == JOBS
        ),
        "the pod that came was given work": strict_pods[PODS][0] > 0,
    }
    for promise, kept in promises.items():
        console.print(f"[{'green' if kept else 'red'}]{'kept' if kept else 'BROKEN'}[/]: {promise}")
    for text in strict.errors[:5]:
        console.print(f"error: {text}", markup=False)
    if os.environ.get("KEEP", "0") not in ("", "0"):
        console.print(f"\nLeft running; Ctrl-C ends it. Its files are in {show.folder}. Try:")
        console.print(f"  curl -i 'http://{show.proxy_address}/job?seconds=1'")
        console.print(f"  curl -i 'http://{show.proxy_address}/nowhere'")
        console.print(f"  curl 'http://{show.admin_address}/api/v1/state'")
        console.print(f"  curl 'http://{show.admin_address}/readyz'")
        await Deferred()
    if not all(promises.values()):
        raise SystemExit(1)


def result_table(
    show: Demo,
    ideal: float,
    spread: tuple[Outcome, list[tuple[int, int]]],
    strict: tuple[Outcome, list[tuple[int, int]]],
) -> Table:
    """Return the comparison."""
    table = Table(title="The same load twice")
    for heading in ("", "at random", "strictproxy"):
        table.add_column(heading, justify="left" if not heading else "right")

    def row(label: str, tell: Callable[[Outcome, list[tuple[int, int]]], str]) -> None:
        table.add_row(label, tell(*spread), tell(*strict))

    row("makespan", lambda run, _: f"{run.makespan:.2f} s")
    row(f"  against the ideal {ideal:.2f} s", lambda run, _: f"x {run.makespan / ideal:.3f}")
    row("waiting, p50", lambda run, _: f"{run.wait_percentile(50):.2f} s")
    row("waiting, p95", lambda run, _: f"{run.wait_percentile(95):.2f} s")
    for index, pod in enumerate(show.pods):
        mark = {1: " (leaves)", PODS: " (comes)"}.get(index, "")
        row(
            f"{pod.host}{mark}: requests / most in flight",
            lambda _, pods, index=index: f"{pods[index][0]} / {pods[index][1]}",  # type: ignore[misc]
        )
    row("errors", lambda run, _: str(len(run.errors)))
    return table


if __name__ == "__main__":
    react(lambda reactor: Deferred.fromCoroutine(demo(reactor)))
