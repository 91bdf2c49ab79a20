"""A soak of `grinmoe serve`: well-behaved streams and hostile clients at once, for minutes, and what is left behind.

    python -m benchmarks soak                      # 10 minutes, 32 streams
    python -m benchmarks soak --minutes 0.5 --one-at-a-time

The server is a process of its own with a tiny model, so that the figures are the server's and not a model's. Each of the 32
clients streams its answer again and again and compares it with the one that it got at first. Beside them hostile clients
leave streams, send bad, large and half bodies, send slowly, and do not read. The report has the server's latency, memory and
file descriptors before the load, under it, and after it.
"""

from __future__ import annotations

import collections
import itertools
import json
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.protocol import Report
from grinmoe.provenance import CHECKOUT, markdown_table

# Answers of one client before and after the load, which the latencies are taken of.
ALONE = 50
# Seconds between two looks at memory and file descriptors; and after the load until the server has to be at rest.
LOOK_S, REST_S = 2.0, 60.0
ANSWER_TOKENS = 24
CHATS = "/v1/chat/completions"


@dataclass(frozen=True)
class SoakSettings:
    """
    Attributes:
        minutes: of load.
        streams: well-behaved clients at a time.
        one_at_a_time: without continuous batching.
    """

    minutes: float = 10.0
    streams: int = 32
    one_at_a_time: bool = False


@dataclass
class Counts:
    """What has happened, of all threads together; `errors` are those that should not have happened."""

    events: collections.Counter = field(default_factory=collections.Counter)
    errors: collections.Counter = field(default_factory=collections.Counter)
    first_s: list[float] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)
    health_s: list[float] = field(default_factory=list)
    lock: Any = field(default_factory=threading.Lock)

    def note(self, event: str) -> None:
        with self.lock:
            self.events[event] += 1

    def blame(self, error: str) -> None:
        with self.lock:
            self.errors[error] += 1


def run(settings: SoakSettings) -> Path:
    """
    Run the soak and return the path of its report.

    Raises:
        RuntimeError: a well-behaved client got an error, a hostile one got another answer than it should, or the server did
            not come to rest. The report is written all the same.
    """
    report = Report("soak" + ("-one-at-a-time" if settings.one_at_a_time else ""), asdict(settings))
    with tempfile.TemporaryDirectory() as folder, served(Path(folder), settings) as (process, url):
        facts = soak(settings, process.pid, url)
        code, output = end(process)
        facts["exit_code"], facts["log_bytes"] = code, len(output)
    report.add("soak", facts, section_of(facts))
    path = report.finish()
    if problems := problems_of(facts):
        raise RuntimeError("; ".join(problems) + f"; see {path}")
    return path


@contextmanager
def served(folder: Path, settings: SoakSettings) -> Iterator[tuple[subprocess.Popen, str]]:
    """The command with a tiny model, and its address."""
    from tests.small_chat import save_talking_model, words

    save_talking_model(folder / "tiny-chat", words(), length=256, intermediate_size=32)
    command = [sys.executable, "-m", "grinmoe_cli", "serve", "--model", str(folder / "tiny-chat"), "--port", "0"]
    options = ["--device", "cpu", "--request-timeout", "10", *(["--no-continuous-batching"] * settings.one_at_a_time)]
    process = subprocess.Popen(
        [*command, *options], cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if " is ready at " in line:
                yield process, line.split(" is ready at ")[1].split()[0].removesuffix("/v1")
                return
        raise RuntimeError("the server did not start")
    finally:
        process.kill()
        process.wait()


def end(process: subprocess.Popen) -> tuple[int, str]:
    """Exit code after SIGTERM, and what the server has printed since it was ready."""
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


def soak(settings: SoakSettings, pid: int, url: str) -> dict[str, Any]:
    """Load a server, and measure it before, meanwhile and after."""
    counts = Counts()
    before = alone(url, pid)
    expected = {question: ask(url, question)[0] for question in questions(settings.streams)}
    ended = threading.Event()
    works: list[Callable[[], None]] = [
        lambda question=question, answer=answer: stream_again_and_again(url, question, answer, counts, ended)
        for question, answer in expected.items()
    ]
    works += [lambda hostile=hostile: repeat(hostile, url, counts, ended) for hostile in HOSTILE]
    works.append(lambda: watch_health(url, counts, ended))
    threads = [threading.Thread(target=work, daemon=True) for work in works]
    looks = []
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60 * settings.minutes
    while time.monotonic() < deadline:
        time.sleep(LOOK_S)
        looks.append(look(pid))
    ended.set()
    for thread in threads:
        thread.join(120)
    is_at_rest = comes_to_rest(pid, before["look"]["files"])
    after = alone(url, pid)
    facts: dict[str, Any] = {"before": before, "after": after, "is_at_rest": is_at_rest}
    facts["hung_clients"] = sum(thread.is_alive() for thread in threads)
    facts |= {"events": dict(sorted(counts.events.items())), "errors": dict(sorted(counts.errors.items()))}
    facts["under_load"] = {
        "first_token_s": quantiles(counts.first_s),
        "answer_s": quantiles(counts.whole_s),
        "health_s": quantiles(counts.health_s),
        "most_rss_mib": max(one["rss_mib"] for one in looks),
        "most_files": max(one["files"] for one in looks),
        "rss_mib_of_tenths": [
            round(statistics.median(one["rss_mib"] for one in part), 1)
            for part in (looks[i * len(looks) // 10 : (i + 1) * len(looks) // 10] for i in range(10))
            if part
        ],
    }
    return facts


def questions(count: int) -> list[str]:
    """Different questions that the tiny model's tokenizer has words for."""
    from tests.small_chat import COLOURS, THINGS

    pairs = itertools.cycle(itertools.product(COLOURS, THINGS))
    return [
        f"What is a {colour} {thing}? {number}" for number, (colour, thing) in zip(range(count), pairs, strict=False)
    ]


def body_of(question: str, **options: Any) -> bytes:
    messages = [{"role": "user", "content": question}]
    return json.dumps({"messages": messages, "temperature": 0, "max_tokens": ANSWER_TOKENS, **options}).encode()


def ask(url: str, question: str) -> tuple[str, float, float]:
    """The text of one streamed answer, and the seconds to its first token and to its end."""
    body, began, first = body_of(question, stream=True), time.perf_counter(), None
    request = urllib.request.Request(url + CHATS, body, {"Content-Type": "application/json"})
    text = []
    with urllib.request.urlopen(request, timeout=300) as answer:
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise RuntimeError(chunk["error"]["message"])
            if piece := chunk["choices"][0]["delta"].get("content"):
                first = first or time.perf_counter() - began
                text.append(piece)
    whole = time.perf_counter() - began
    return "".join(text), first or whole, whole


def alone(url: str, pid: int) -> dict[str, Any]:
    """Latency of one client, and the server's memory and files afterwards."""
    times = [ask(url, question)[1:] for question in questions(ALONE)]
    return {
        "first_token_s": quantiles([first for first, _ in times]),
        "answer_s": quantiles([whole for _, whole in times]),
        "look": look(pid),
    }


def look(pid: int) -> dict[str, float]:
    import psutil

    process = psutil.Process(pid)
    return {
        "rss_mib": round(process.memory_info().rss / 2**20, 1),
        "files": process.num_fds(),
        "threads": process.num_threads(),
    }


def comes_to_rest(pid: int, files: int) -> bool:
    """Whether all connections end, within REST_S seconds."""
    deadline = time.monotonic() + REST_S
    while look(pid)["files"] > files + 2:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Median, 95th and 99th percentile, and the largest."""
    if not seconds:
        return {}
    ordered = sorted(seconds)
    places = {"median": 0.5, "p95": 0.95, "p99": 0.99, "most": 1.0}
    return {name: round(ordered[min(int(part * len(ordered)), len(ordered) - 1)], 4) for name, part in places.items()}


def stream_again_and_again(url: str, question: str, expected: str, counts: Counts, ended: threading.Event) -> None:
    while not ended.is_set():
        try:
            text, first, whole = ask(url, question)
        except (OSError, RuntimeError, ValueError) as error:
            counts.blame(f"stream: {type(error).__name__}: {str(error)[:80]}")
            time.sleep(0.1)
            continue
        with counts.lock:
            counts.first_s.append(first)
            counts.whole_s.append(whole)
            counts.events["answers"] += 1
            if text != expected:
                counts.errors["stream: another answer than at first"] += 1


def watch_health(url: str, counts: Counts, ended: threading.Event) -> None:
    while not ended.wait(0.2):
        began = time.perf_counter()
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=60):
                counts.health_s.append(time.perf_counter() - began)
        except OSError as error:
            counts.blame(f"health: {type(error).__name__}")


def repeat(
    hostile: Callable[[str, Counts, random.Random], None], url: str, counts: Counts, ended: threading.Event
) -> None:
    numbers = random.Random(hostile.__name__)
    while not ended.is_set():
        try:
            hostile(url, counts, numbers)
        except OSError as error:  # the server may close what it does not want
            counts.note(f"{hostile.__name__}: closed by the server ({type(error).__name__})")
        time.sleep(0.05)


def connect(url: str) -> socket.socket:
    parts = urlsplit(url)
    assert parts.hostname and parts.port
    return socket.create_connection((parts.hostname, parts.port), timeout=60)


def post_head(url: str, length: int) -> bytes:
    host = urlsplit(url).netloc
    return (
        f"POST {CHATS} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


def leaves_its_stream(url: str, counts: Counts, numbers: random.Random) -> None:
    """A client that closes its connection at some moment: in the request, before the answer, or in it."""
    body = body_of("What is a red stone?", stream=True, max_tokens=200)
    whole = post_head(url, len(body)) + body
    with connect(url) as connection:
        size = len(whole) if numbers.random() < 0.7 else numbers.randrange(len(whole))
        connection.sendall(whole[:size])
        if size == len(whole) and numbers.random() < 0.7:
            connection.recv(numbers.randrange(1, 4000))
        time.sleep(numbers.random() / 20)
    counts.note("left")


BAD_BODIES: dict[str, tuple[bytes, int]] = {
    "not JSON": (b"{", 400),
    "bytes": (bytes(range(256)) * 40, 400),
    "deep": (b"[" * 100_000, 400),
    "no messages": (b'{"messages": []}', 400),
    "stop of a megabyte": (body_of("Hi", stop="x" * 10**6), 400),
    "200,000 stops": (body_of("Hi", stop=["x"] * 200_000), 400),
    "200,000 messages": (b'{"messages": [' + b'{"role":"user","content":""},' * 100_000 + b"{}]}", 400),
    "a prompt of megabytes": (body_of("What is a stone? " * 150_000), 400),
    "a million digits": (b'{"seed": ' + b"9" * 10**6 + b"}", 400),
    "too large": (b" " * (5 * 2**20), 413),
}


def sends_bad_bodies(url: str, counts: Counts, numbers: random.Random) -> None:
    name = numbers.choice(list(BAD_BODIES))
    body, expected = BAD_BODIES[name]
    request = urllib.request.Request(url + CHATS, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            counts.blame(f"{name}: {answer.status} in place of {expected}")
    except urllib.error.HTTPError as error:
        error.read()
        if error.code == expected:
            counts.note(f"refused with {error.code}")
        else:
            counts.blame(f"{name}: {error.code} in place of {expected}")


def sends_half_a_body(url: str, counts: Counts, numbers: random.Random) -> None:
    """Clients that send a part of a megabyte and wait."""
    held = [connect(url) for _ in range(8)]
    try:
        for connection in held:
            connection.sendall(post_head(url, 2**20) + b" " * numbers.randrange(2**19))
        time.sleep(numbers.random() * 2)
        counts.note("half bodies")
    finally:
        for connection in held:
            connection.close()


def sends_slowly(url: str, counts: Counts, numbers: random.Random) -> None:
    """A byte of a head or of a body now and then, until the server ends it."""
    body = body_of("Hi")
    whole = post_head(url, len(body)) + body
    sent, began = 0, time.monotonic()
    with connect(url) as connection:
        connection.settimeout(0.2)
        while sent < len(whole) - 1 and time.monotonic() < began + 60:
            connection.sendall(whole[sent : sent + 1])
            sent += 1
            try:
                answer = connection.recv(1000)
            except TimeoutError:
                continue
            counts.note("slow request ended" if not answer or b" 408 " in answer[:20] else "slow request answered")
            return
    counts.blame("a slow request was not ended in 60 s")


def does_not_read(url: str, counts: Counts, numbers: random.Random) -> None:
    body = body_of("What is a red stone?", stream=True, max_tokens=200)
    with connect(url) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.sendall(post_head(url, len(body)) + body)
        time.sleep(numbers.random() * 3)
    counts.note("not read")


def holds_connections(url: str, counts: Counts, numbers: random.Random) -> None:
    """Many idle connections at a time."""
    held = []
    try:
        for _ in range(100):
            held.append(connect(url))
        time.sleep(numbers.random() * 3)
        counts.note("idle connections")
    finally:
        for connection in held:
            connection.close()


HOSTILE = (
    *[leaves_its_stream] * 3,
    *[sends_bad_bodies] * 2,
    sends_half_a_body,
    *[sends_slowly] * 4,
    *[does_not_read] * 2,
    holds_connections,
)


def problems_of(facts: dict[str, Any]) -> list[str]:
    """What a server may not do under such a load."""
    problems = [f"{error} ({count} times)" for error, count in facts["errors"].items()]
    if facts["hung_clients"]:
        problems.append(f"{facts['hung_clients']} clients wait for ever")
    if not facts["is_at_rest"]:
        problems.append("connections stay open after the load")
    if facts["exit_code"] or facts["log_bytes"]:
        problems.append(f"the server ended with {facts['exit_code']} and logged {facts['log_bytes']} bytes")
    return problems


def section_of(facts: dict[str, Any]) -> str:
    before, after, load = facts["before"], facts["after"], facts["under_load"]

    def times(of: dict[str, Any], name: str) -> str:
        found = {key: 1e3 * value for key, value in of[name].items()}
        return f"{found['median']:.1f} / {found['p95']:.1f} / {found['p99']:.1f} / {found['most']:.1f}" if found else ""

    rows = [
        ["first token, ms", *(times(one, "first_token_s") for one in (before, load, after))],
        [f"answer of up to {ANSWER_TOKENS} tokens, ms", *(times(one, "answer_s") for one in (before, load, after))],
        ["/health, ms", "", times(load, "health_s"), ""],
        [
            "resident memory, MiB",
            before["look"]["rss_mib"],
            f"{load['most_rss_mib']} at most",
            after["look"]["rss_mib"],
        ],
        ["file descriptors", before["look"]["files"], f"{load['most_files']} at most", after["look"]["files"]],
        ["threads", before["look"]["threads"], "", after["look"]["threads"]],
    ]
    events = [[event, count] for event, count in facts["events"].items()]
    problems = "\n".join(f"- {problem}" for problem in problems_of(facts)) or "None."
    memory = ", ".join(map(str, load["rss_mib_of_tenths"]))
    return "\n\n".join(
        [
            "## Before, under and after the load",
            "Times are median / 95th / 99th percentile / largest. One client asks before and after the load.",
            markdown_table(["", "before", "under load", "after"], [list(map(str, row)) for row in rows]),
            f"Resident memory in each tenth of the load (median, MiB): {memory}.",
            "## What happened",
            markdown_table(["event", "times"], [list(map(str, row)) for row in events]),
            "## Errors",
            problems,
        ]
    )
