"""Many, slow and vanishing clients: bounded connections, bodies, requests and files, and answers for the others."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import time

import psutil
import pytest
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

import grinmoe.serving.http as http
from grinmoe.serving.gate import ADMITTED, Gate, Limits
from tests.serving.hostile import connect, head, is_closed, post, post_head, read_answer, send, watched_health
from tests.serving.served_model import ask, chat, in_this_process, start

pytestmark = pytest.mark.integration

CHATS = "/v1/chat/completions"
ENDLESS = json.dumps({"eos_token_id": -1, "do_sample": False})
LIMITS = Limits(max_body=2**16, max_connections=40, max_requests=4, request_timeout=1.0, write_timeout=1.0)


def until(condition, seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture(scope="module", params=[True, False], ids=["batch", "one at a time"])
def server(request, served_folder):
    """Client, address and the server; short times, few places, and answers of up to a million tokens."""
    sizes = {"max_length": 10**6, "max_new_tokens": 10**6}
    with in_this_process(served_folder, request.param, http_limits=LIMITS, **sizes) as (client, _, running):
        yield client, str(client.base_url).removesuffix("/v1/"), running


@pytest.fixture
def url(server):
    return server[1]


@pytest.fixture
def gate(server):
    return server[2]._gate


def answered(url: str) -> bool:
    status, answer = post(url, CHATS, {"messages": chat("What?"), "max_tokens": 2, "temperature": 0})
    return status == 200 and bool(answer["choices"])


def endless(**options) -> dict:
    return {"messages": chat("What?"), "generation_config": ENDLESS, "max_tokens": 10**6, **options}


class TestSlowRequests:
    @pytest.mark.parametrize(
        "first",
        [b"", b"POST /v1/chat", b"GET /health HTTP/1.1\r\nHost: local"],
        ids=["nothing", "half a line", "half a head"],
    )
    def test_connection_without_a_whole_head_is_closed(self, url, first):
        with connect(url) as connection:
            connection.sendall(first)
            assert is_closed(connection, 20)

    def test_head_that_comes_byte_by_byte_is_not_waited_for(self, url):
        """Each byte alone would keep uvicorn's connection open."""
        with connect(url) as connection:
            deadline = time.monotonic() + 20
            try:
                while time.monotonic() < deadline:
                    connection.sendall(b"x")
                    time.sleep(0.05)
            except ConnectionError:
                return
        raise AssertionError("the connection is still open")

    def test_second_request_of_a_connection_has_to_arrive_in_time_too(self, url):
        with connect(url) as connection:
            connection.sendall(head("GET", "/health", url))
            assert read_answer(connection)[0] == 200
            connection.sendall(b"GET /hea")
            assert is_closed(connection, 20)

    @pytest.mark.parametrize("is_dripping", [False, True], ids=["half", "dripping"])
    @pytest.mark.parametrize("is_chunked", [False, True], ids=["length", "chunks"])
    def test_body_that_does_not_arrive_in_time_is_refused(self, url, gate, is_chunked, is_dripping):
        with connect(url) as connection:
            if is_chunked:
                connection.sendall(
                    head("POST", CHATS, url, Content_Type="application/json", Transfer_Encoding="chunked")
                )
                piece = b"1\r\n \r\n"
            else:
                connection.sendall(post_head(CHATS, url, 60_000))
                piece = b" "
            deadline = time.monotonic() + 20
            connection.settimeout(0.05)
            answer = b""
            while not answer and time.monotonic() < deadline:
                if is_dripping:
                    connection.sendall(piece)
                try:
                    answer = connection.recv(65536)
                except TimeoutError:
                    continue
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert is_closed(connection, 20)
        assert until(lambda: gate.held == 0)

    def test_chunks_beyond_the_limit_are_refused(self, url, gate):
        chunk = b"400\r\n" + b" " * 1024 + b"\r\n"
        request = head("POST", CHATS, url, Content_Type="application/json", Transfer_Encoding="chunked") + chunk * 65
        assert send(url, request)[0] == 413
        assert until(lambda: gate.held == 0)

    def test_chunked_body_is_answered(self, url):
        body = json.dumps({"messages": chat("What?"), "max_tokens": 2}).encode()
        chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
        request = head("POST", CHATS, url, Content_Type="application/json", Transfer_Encoding="chunked") + chunks
        assert send(url, request)[0] == 200

    def test_expected_continue_is_sent_for_a_body_that_is_wanted_alone(self, url):
        body = json.dumps({"messages": chat("What?"), "max_tokens": 2}).encode()
        with connect(url) as connection:
            connection.sendall(post_head(CHATS, url, len(body), Expect="100-continue"))
            assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
            connection.sendall(body)
            assert read_answer(connection)[0] == 200
        assert send(url, post_head(CHATS, url, 2**20, Expect="100-continue"))[0] == 413

    def test_pipelined_requests_are_answered_in_order(self, url):
        requests = b"".join(head("GET", path, url) for path in ("/health", "/nowhere", "/v1/models", "/health"))
        with connect(url) as connection:
            connection.sendall(requests)
            with connection.makefile("rb") as lines:
                found = []
                for _ in range(4):
                    found.append(int(lines.readline().split()[1]))
                    fields = iter(lambda: lines.readline().strip().lower(), b"")
                    length = next(
                        int(field.split(b":")[1]) for field in list(fields) if field.startswith(b"content-length")
                    )
                    lines.read(length)
        assert found == [200, 404, 200, 200]

    def test_ambiguous_length_is_refused(self, url):
        fields = {"Content_Type": "application/json", "Transfer_Encoding": "chunked", "Content_Length": 5}
        assert send(url, head("POST", CHATS, url, **fields) + b"0\r\n\r\n")[0] == 400
        twice = post_head(CHATS, url, 5).replace(b"\r\n\r\n", b"\r\nContent-Length: 6\r\n\r\n")
        assert send(url, twice + b"12345")[0] == 400


class TestConnections:
    def test_more_connections_than_the_limit_leave_room_for_new_ones(self, server):
        """The one that has waited longest for its request is closed."""
        _, url, running = server
        idle = []
        try:
            for _ in range(3 * LIMITS.max_connections):
                idle.append(connect(url))
                assert len(running.server_state.connections) <= LIMITS.max_connections + 5
            with watched_health(url) as health:
                assert answered(url)
            assert max(health) < 20
            assert is_closed(idle[0], 20)
        finally:
            for connection in idle:
                connection.close()

    def test_half_sent_bodies_are_held_within_a_bound(self, server, gate):
        _, url, _ = server
        half = []
        try:
            for _ in range(30):
                connection = connect(url)
                connection.sendall(post_head(CHATS, url, 65_000) + b" " * 60_000)
                half.append(connection)
            assert gate.held <= LIMITS.max_bodies + 2**16
            assert answered(url)
        finally:
            for connection in half:
                connection.close()
        assert until(lambda: gate.held == 0)

    @pytest.mark.integration
    def test_client_that_does_not_read_its_answer_is_let_go(self, server, gate):
        _, url, _ = server
        body = json.dumps(endless(stream=True)).encode()
        with connect(url) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(post_head(CHATS, url, len(body)) + body)
            connection.recv(100)
            assert until(lambda: gate.places == 1)
            assert until(lambda: gate.places == 0, 300), "its place is free, though its connection is open"

    def test_disconnects_at_every_stage_leave_nothing_behind(self, server, gate):
        _, url, running = server
        body = json.dumps(endless(stream=True)).encode()
        whole = post_head(CHATS, url, len(body)) + body
        for size in (0, 1, 10, len(whole) - len(body), len(whole) - 1, len(whole)):
            for wait in (0.0, 0.05):
                with connect(url) as connection:
                    connection.sendall(whole[:size])
                    time.sleep(wait)
        assert until(lambda: not running.server_state.connections and not running.server_state.tasks)
        assert (gate.held, gate.places, gate._arriving) == (0, 0, {})
        assert answered(url)

    def test_tiny_reads_keep_chunks_of_one_byte_from_taking_the_loop(self):
        """At most so many bytes of one connection are parsed at a time."""
        assert issubclass(http.Connection, asyncio.BufferedProtocol)
        assert http._READ_BYTES <= 2**14


@pytest.mark.integration
@pytest.mark.parametrize("continuous_batching", [True, False], ids=["batch", "one at a time"])
def test_server_ends_though_a_client_does_not_read_its_answer(served_folder, continuous_batching, monkeypatch, caplog):
    monkeypatch.setattr(http, "GRACE_S", 0.5)
    sizes = {"max_length": 10**6, "max_new_tokens": 10**6}
    with in_this_process(served_folder, continuous_batching, **sizes) as (client, _, running):
        url = str(client.base_url).removesuffix("/v1/")
        body = json.dumps(endless(stream=True)).encode()
        with connect(url) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(post_head(CHATS, url, len(body)) + body)
            assert until(lambda: any(one.flow.write_paused for one in list(running.server_state.connections)), 300)
            running.should_exit = True
            assert until(lambda: not running.server_state.tasks)
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


class TestQueue:
    def test_more_requests_than_places_get_429_with_a_time_to_try_again(self, server, gate):
        client, url, _ = server
        streams = [
            ask(client, "What?", stream=True, max_tokens=10**6, extra_body={"generation_config": ENDLESS})
            for _ in range(4)
        ]
        try:
            assert gate.places == 4
            body = json.dumps({"messages": chat("What?")}).encode()
            status, headers, answer = send(url, post_head(CHATS, url, len(body)) + body)
            error = json.loads(answer)["error"]
            assert (status, error["type"], error["code"]) == (429, "rate_limit_error", "rate_limit_exceeded")
            assert int(headers["retry-after"]) > 0
            assert send(url, head("GET", "/health", url))[0] == 200
        finally:
            for stream in streams:
                stream.close()
        assert until(lambda: gate.places == 0)
        assert answered(url)

    def test_prompts_of_a_list_take_a_place_each(self, server, gate):
        _, url, _ = server
        assert post(url, "/v1/completions", {"prompt": ["a"] * 4, "max_tokens": 1})[0] == 200
        status, answer = post(url, "/v1/completions", {"prompt": ["a"] * 6, "max_tokens": 1})
        assert (status, "a request has at most 4 prompts" in answer["error"]["message"]) == (400, True)
        assert until(lambda: gate.places == 0)

    def test_refused_requests_give_their_places_back(self, server, gate):
        _, url, _ = server
        for _ in range(3 * LIMITS.max_requests):
            assert post(url, CHATS, {"messages": []})[0] == 400
        assert until(lambda: gate.places == 0)


class TestGate:
    """The gate by itself, with messages of a client."""

    def run(self, gate, messages, method="POST", **fields):
        """Statuses of the answers, when the client has sent these messages and then says nothing."""
        sent = []
        left = iter(messages)

        async def receive():
            message = next(left, None)
            if message is None:
                await asyncio.Event().wait()
            return message

        async def send(message):
            sent.append(message)

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": method, "path": "/", "http_version": "1.1", "headers": headers}
        asyncio.run(asyncio.wait_for(gate(scope, receive, send), 60))
        return [message["status"] for message in sent if message["type"] == "http.response.start"]

    @staticmethod
    async def never_answers(scope, receive, send):
        await asyncio.Event().wait()

    def test_request_without_an_answer_yet_ends_with_its_client(self):
        ended = []

        async def application(scope, receive, send):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                ended.append(True)
                raise

        gate = Gate(application)
        assert self.run(gate, [{"type": "http.disconnect"}], "GET") == []
        assert self.run(gate, [{"type": "http.request", "body": b"{}"}, {"type": "http.disconnect"}]) == []
        assert ended == [True, True]

    def test_client_that_leaves_in_the_middle_of_its_body_is_forgotten(self):
        gate = Gate(self.never_answers)
        assert (
            self.run(gate, [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])
            == []
        )
        assert (gate.held, gate._arriving) == (0, {})

    def test_body_that_is_too_large_is_not_kept(self):
        gate = Gate(self.never_answers, limits=Limits(max_body=100))
        assert self.run(gate, [{"type": "http.request", "body": bytes(60), "more_body": True}] * 2) == [413]
        assert gate.held == 0

    def test_application_gets_the_body_once_and_its_bytes_are_given_back(self):
        found = []

        async def application(scope, receive, send):
            with scope[ADMITTED].body() as body:
                found.append((body, gate.held))
            found.append(gate.held)
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        gate = Gate(application)
        pieces = [{"type": "http.request", "body": b"ab", "more_body": True}, {"type": "http.request", "body": b"cd"}]
        assert self.run(gate, pieces) == [200]
        assert found == [(b"abcd", 4), 0]

    def test_new_bodies_take_the_room_of_the_oldest_that_still_arrives(self):
        gate = Gate(self.never_answers, limits=Limits(max_body=100))  # 800 bytes in all

        async def arrive(size: int, statuses: list) -> None:
            async def receive():
                if not statuses:
                    statuses.append("read")
                    return {"type": "http.request", "body": bytes(size), "more_body": True}
                await asyncio.Event().wait()

            async def send(message):
                if message["type"] == "http.response.start":
                    statuses.append(message["status"])

            headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
            scope = {"type": "http", "method": "POST", "path": "/", "http_version": "1.1", "headers": headers}
            await gate(scope, receive, send)

        async def all_of_them() -> list[list]:
            found: list[list] = [[] for _ in range(12)]
            tasks = []
            for statuses in found:
                tasks.append(asyncio.ensure_future(arrive(90, statuses)))
                for _ in range(5):
                    await asyncio.sleep(0)
                assert gate.held <= gate.limits.max_bodies
            gate.close()
            await asyncio.gather(*tasks)
            return found

        assert asyncio.run(all_of_them()) == [["read", 503]] * 12
        assert gate.held == 0

    def test_closed_gate_refuses(self):
        gate = Gate(self.never_answers)
        gate.close()
        assert self.run(gate, [{"type": "http.request", "body": b"{}"}]) == [503]


def test_requests_that_were_left_keep_nothing(served_folder):
    """Of each, the batch made one result more, with the whole prompt, which nobody reads."""
    with in_this_process(served_folder, True, max_length=10**6, max_new_tokens=10**6) as (client, manager, running):
        url = str(client.base_url).removesuffix("/v1/")
        body = json.dumps(endless(stream=True)).encode()
        for _ in range(12):
            with connect(url) as connection:
                connection.sendall(post_head(CHATS, url, len(body)) + body)
                assert connection.recv(1000)
        assert until(lambda: running._gate.places == 0)
        # A whole answer comes after the step that was under way; the one after it finds what that has left.
        assert answered(url) and answered(url)
        router = manager._cb.output_router
        assert router.output_queue.empty()
        assert not router.result_handlers


@pytest.mark.integration
class TestCommand:
    """The command as a user starts it."""

    @pytest.fixture(scope="class", params=[(), ("--no-continuous-batching",)], ids=["batch", "one at a time"])
    def few_files(self, served_folder, request):
        served = start(served_folder, "--request-timeout", "2", *request.param, open_files=256)
        yield served
        code, output = served.end(signal.SIGTERM)
        assert (code, output) == (0, ""), "it logs nothing, whatever clients do"

    def test_more_connections_than_files_neither_spin_nor_log_nor_stop_it(self, few_files):
        process = psutil.Process(few_files.process.pid)
        idle: list[socket.socket] = []
        try:
            for _ in range(600):
                idle.append(connect(few_files.root))
            assert process.num_fds() < 256
            with watched_health(few_files.root) as health:
                assert answered(few_files.root)
            assert max(health) < 20
            before = sum(process.cpu_times()[:2])
            time.sleep(2)
            assert sum(process.cpu_times()[:2]) - before < 1.5, "it waits, and does not spin"
        finally:
            for connection in idle:
                connection.close()

    def test_what_is_not_http_is_refused_without_a_word_in_the_log(self, few_files):
        for request in (
            b"\x16\x03\x01" + bytes(200),
            b"GET\r\n\r\n",
            b"x" * 100_000,
            b"\r\n" * 5000,
            b"GET / HTTP/9.9\r\n\r\n",
        ):
            with connect(few_files.root) as connection:
                connection.sendall(request)
                assert is_closed(connection, 30)
        assert answered(few_files.root)

    def test_sigterm_ends_it_though_clients_send_and_read_nothing(self, served_folder):
        served = start(served_folder)
        idle = [connect(served.root) for _ in range(5)]
        for connection in idle[1:]:
            connection.sendall(post_head(CHATS, served.root, 1000) + b"{")
        idle[0].sendall(b"GET / HT")
        time.sleep(0.5)
        began = time.monotonic()
        assert served.end(signal.SIGTERM) == (0, "")
        assert time.monotonic() - began < 60
        for connection in idle:
            connection.close()

    def test_listening_beyond_loopback_without_a_key_is_warned_of(self, served_folder, tmp_path):
        served = start(served_folder, "--host", "0.0.0.0")
        url = served.root.replace("0.0.0.0", "127.0.0.1")
        assert send(url, head("GET", "/v1/models", url))[0] == 200
        assert send(url, head("GET", "/v1/models", url, Host="evil.example"))[0] == 421
        assert "warning: everyone who can reach port" in served.before and "--api-key-file" in served.before
        served.end(signal.SIGTERM)
        (tmp_path / "key").write_text("secret-0123456789\n")
        served = start(served_folder, "--host", "0.0.0.0", "--api-key-file", str(tmp_path / "key"))
        url = served.root.replace("0.0.0.0", "127.0.0.1")
        assert "warning" not in served.before
        assert send(url, head("GET", "/v1/models", url))[0] == 401
        assert send(url, head("GET", "/v1/models", url, Authorization="Bearer secret-0123456789"))[0] == 200
        assert send(url, head("GET", "/health", url))[0] == 200
        served.end(signal.SIGTERM)


class TestInsideUvicorn:
    """What `http.py` builds on. Where one of these fails, that has moved."""

    def test_protocol_and_cycle(self):
        assert {"on_response_complete", "connection_made", "data_received"} <= set(vars(H11Protocol))
        names = set(RequestResponseCycle.__init__.__code__.co_names) | set(H11Protocol.__init__.__code__.co_names)
        assert {"cycle", "connections", "more_body", "response_started", "response_complete"} <= names
