"""Who may send requests to the server, and in which form."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request

import pytest

from grinmoe.serving.access import Access, read_api_key
from grinmoe.serving.options import ServeOptions
from tests.serving.hostile import head, post, post_head, send
from tests.serving.served_model import in_this_process

CHATS = "/v1/chat/completions"
BODY = json.dumps({"messages": [{"role": "user", "content": "What?"}], "max_tokens": 2}).encode()
KEY = b"sk-local-0123456789"


def refused(
    access: Access, method: str = "GET", path: str = "/v1/models", version: str = "1.1", **fields: str
) -> int | None:
    """Status of the refusal of a head, or None."""
    headers = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in fields.items()]
    scope = {"type": "http", "method": method, "path": path, "http_version": version, "headers": headers}
    response = access.refused(scope, 1000)
    return None if response is None else response.status_code


class TestHost:
    @pytest.mark.parametrize(
        "host",
        [
            "localhost",
            "LocalHost:8000",
            "localhost.",
            "127.0.0.1",
            "127.0.0.1:8000",
            "127.5.5.5",
            "[::1]",
            "[::1]:8000",
        ],
    )
    def test_host_of_the_loopback_interface_is_known(self, host):
        assert refused(Access.at("127.0.0.1", "127.0.0.1", (), None), host=host) is None

    @pytest.mark.parametrize(
        "host",
        [
            "evil.example",
            "evil.example:8000",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "evil.example#localhost",
            "user@localhost",
            "localhost, evil.example",
            "localhost/..",
            "",
            ":8000",
            "[::1",
            "192.0.2.7",
            "10.0.0.1",
            "0.0.0.0",
            "[::ffff:7f00:1]x",
            "x" * 10_000,
            "localhost\xe9",
        ],
        ids=lambda value: value[:30],
    )
    def test_other_host_is_refused_at_the_loopback_interface(self, host):
        access = Access.at("127.0.0.1", "127.0.0.1", (), None)
        assert refused(access, host=host) == 421
        assert refused(access, "POST", host=host, content_type="application/json") == 421
        assert refused(access, path="/health", host=host) == 421

    def test_host_is_missing_only_in_http_1_0(self):
        access = Access.at("127.0.0.1", "127.0.0.1", (), None)
        assert refused(access) == 421
        assert refused(access, version="1.0") is None

    @pytest.mark.parametrize("listens_at", ["0.0.0.0", "::"])
    def test_any_address_and_the_name_of_the_machine_are_known_where_all_addresses_are_listened_at(self, listens_at):
        access = Access.at(listens_at, listens_at, ("Models.Example.org",), None)
        name = socket.gethostname()
        for host in (
            "192.0.2.7:8000",
            "[2001:db8::7]:8000",
            "localhost",
            name,
            f"{name}.local",
            "models.example.org:443",
        ):
            assert refused(access, host=host) is None
        for host in ("evil.example", "example.org", "192.0.2.7.evil.example", "1.2.3"):
            assert refused(access, host=host) == 421

    def test_host_that_is_listened_at_is_known_by_name_and_address(self):
        access = Access.at("gpu7.example", "192.0.2.7", (), None)
        assert [refused(access, host=host) for host in ("gpu7.example", "192.0.2.7:8000", "192.0.2.8")] == [
            None,
            None,
            421,
        ]

    def test_star_allows_any_host(self):
        assert refused(Access.at("127.0.0.1", "127.0.0.1", ("*",), None), host="anything.example") is None

    @pytest.mark.parametrize(
        "name",
        [
            "http://a.example",
            "a.example:80",
            "",
            "a b",
            "u@a",
            "a,b",
            "*.example.org",
            "**",
            "b\xfccher.example",
            ".",
            "a\n",
            "[::1]",
            "a?",
            "\udcff",
        ],
        ids=ascii,
    )
    def test_allowed_host_that_is_not_a_name_is_refused(self, name):
        with pytest.raises(ValueError, match="--allowed-host"):
            ServeOptions("m", allowed_host=(name,))


class TestOrigin:
    @pytest.mark.parametrize(
        "origin",
        [
            "https://evil.example",
            "null",
            "http://localhost:3000",
            "http://localhost:8000.evil.example",
            "file://",
            "",
            "x" * 5000,
        ],
        ids=lambda value: value[:20],
    )
    @pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
    def test_page_of_another_origin_is_refused(self, method, origin):
        fields = {"host": "localhost:8000", "origin": origin, "content_type": "application/json"}
        assert refused(Access(), method, **fields) == 403

    def test_page_of_this_origin_and_programs_are_answered(self):
        assert refused(Access(), host="localhost:8000", origin="http://localhost:8000") is None
        assert refused(Access(), host="localhost:8000") is None


class TestKey:
    access = Access(api_key=KEY)

    @pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
    def test_right_key_is_answered(self, scheme):
        assert refused(self.access, host="localhost", authorization=f"{scheme} {KEY.decode()}") is None

    @pytest.mark.parametrize(
        "value",
        [
            "",
            "Bearer",
            "Bearer ",
            "Bearer none",
            f"Basic {KEY.decode()}",
            KEY.decode(),
            f"Bearer {KEY.decode()}x",
            "Bearer \xe9",
        ],
        ids=repr,
    )
    def test_wrong_key_is_refused(self, value):
        for method, path in (("GET", "/v1/models"), ("POST", CHATS), ("GET", "/nowhere"), ("POST", "/load_model")):
            assert refused(self.access, method, path, host="localhost", authorization=value) == 401
        assert refused(self.access, host="localhost") == 401

    def test_health_needs_no_key(self):
        assert refused(self.access, path="/health", host="localhost") is None
        for path in ("/health/", "/health/../v1/models", "//health"):
            assert refused(self.access, path=path, host="localhost") == 401

    def test_key_is_read_without_the_space_around_it(self, tmp_path):
        (tmp_path / "key").write_bytes(b"  " + KEY + b"\r\n")
        assert read_api_key(str(tmp_path / "key")) == KEY

    @pytest.mark.parametrize(
        "content",
        [b"", b"\n", b"two words", b"two\nlines", b"\xff\xfe", "schl\u00fcssel".encode(), b"\x00", b"k" * 5000],
        ids=repr,
    )
    def test_file_that_holds_no_key_is_refused_without_showing_it(self, tmp_path, content):
        (tmp_path / "key").write_bytes(content)
        with pytest.raises(ValueError, match="--api-key-file .* must hold the key alone") as error:
            read_api_key(str(tmp_path / "key"))
        assert "two" not in str(error.value).replace(str(tmp_path), "")

    def test_file_that_cannot_be_read_is_refused(self, tmp_path):
        for file in (tmp_path / "missing", tmp_path):
            with pytest.raises(ValueError, match="--api-key-file .* cannot be read"):
                read_api_key(str(file))


class TestForm:
    @pytest.mark.parametrize(
        "fields, status",
        [
            ({"content_type": "text/plain"}, 415),
            ({"content_type": "application/x-www-form-urlencoded"}, 415),
            ({"content_type": "multipart/form-data; boundary=application/json"}, 415),
            ({"content_type": ""}, 415),
            ({}, 415),
            ({"content_type": "application/json", "content_encoding": "gzip"}, 415),
            ({"content_type": "application/json", "content_length": "1001"}, 413),
            ({"content_type": "application/json", "content_length": "10", "transfer_encoding": "chunked"}, 400),
            ({"content_type": "application/json"}, None),
            ({"content_type": "Application/JSON; charset=utf-8", "content_length": "1000"}, None),
            ({"content_type": "application/json", "content_encoding": "identity"}, None),
        ],
        ids=str,
    )
    def test_form_of_a_post(self, fields, status):
        assert refused(Access(), "POST", CHATS, host="localhost", **fields) == status


class TestServer:
    """The same over a connection, and that clients with the key are answered."""

    @pytest.fixture(scope="class")
    def url(self, served_folder):
        with in_this_process(served_folder, True, access=Access(api_key=KEY)) as (client, _, _):
            yield str(client.base_url).removesuffix("/v1/")

    def test_openai_client_with_the_key_is_answered_and_without_it_is_told(self, url):
        import openai

        client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY.decode(), max_retries=0)
        assert [model.id for model in client.models.list()] == ["tiny-chat"]
        options = {"model": "tiny-chat", "messages": [{"role": "user", "content": "What?"}], "max_tokens": 2}
        assert client.chat.completions.create(**options).usage.completion_tokens > 0
        with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong") as error:
            client.with_options(api_key="none").chat.completions.create(**options)
        assert error.value.code == "invalid_api_key"

    def test_foreign_host_and_origin_get_the_error_of_openai(self, url):
        for fields, status in (({"Host": "evil.example"}, 421), ({"Origin": "https://evil.example"}, 403)):
            found, answer = post(url, CHATS, BODY, Authorization=f"Bearer {KEY.decode()}", **fields)
            assert found == status and answer["error"]["message"]

    def test_refused_body_is_not_read(self, url):
        """The answer comes before the body that the head announces."""
        status, headers, _ = send(url, post_head(CHATS, url, 1000))
        assert status == 401 and headers["www-authenticate"] == "Bearer"
        status, *_ = send(url, post_head(CHATS, url, 10**12, Authorization=f"Bearer {KEY.decode()}"))
        assert status == 413

    def test_client_that_sends_all_of_a_refused_body_reads_the_answer(self, url):
        """urllib reads nothing before all is sent, and asks for an end of the connection."""
        for authorization, status in ((f"Bearer {KEY.decode()}", 413), ("Bearer none", 401)):
            fields = {"Content-Type": "application/json", "Authorization": authorization}
            request = urllib.request.Request(url + CHATS, b" " * 6 * 2**20, fields)
            with pytest.raises(urllib.error.HTTPError) as error:
                urllib.request.urlopen(request, timeout=60)
            assert error.value.code == status
            error.value.close()

    @pytest.mark.parametrize("method", ["OPTIONS", "PUT", "DELETE", "PATCH", "HEAD", "TRACE", "BREW"])
    def test_other_methods_are_refused_with_those_that_there_are(self, url, method):
        status, headers, _ = send(
            url, head(method, CHATS, url, Authorization=f"Bearer {KEY.decode()}", Connection="close")
        )
        assert (status, headers["allow"]) == (405, "POST")

    @pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/models/tiny-chat", "/v1/models/other"])
    def test_head_has_the_status_and_length_of_get(self, url, path):
        found = [
            send(url, head(method, path, url, Authorization=f"Bearer {KEY.decode()}", Connection="close"))
            for method in ("HEAD", "GET")
        ]
        (status, headers, body), (expected, expected_headers, _) = found
        assert (status, headers["content-length"]) == (expected, expected_headers["content-length"])
        assert status == (404 if path.endswith("other") else 200) and body == b""

    def test_websocket_is_not_opened(self, url):
        fields = {
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Key": "x",
            "Sec-WebSocket-Version": 13,
        }
        assert send(url, head("GET", "/v1/models", url, Authorization=f"Bearer {KEY.decode()}", **fields))[0] == 200

    def test_long_paths_are_refused_and_not_quoted(self, url):
        authorization = {"Authorization": f"Bearer {KEY.decode()}"}
        for size in (1000, 10_000):
            status, _, body = send(url, head("GET", "/v1/models/" + "m" * size, url, **authorization))
            assert status == 404 and len(body) < 1200
        assert send(url, head("GET", "/v1/models/" + "m" * 100_000, url, **authorization))[0] == 400

    def test_many_headers_are_refused(self, url):
        request = head("GET", "/health", url, **{f"X-{i}": "x" * 1000 for i in range(1000)})
        assert send(url, request)[0] == 400
