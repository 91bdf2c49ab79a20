"""Options of `grinmoe generate` and `grinmoe serve`."""

import math
import re
from dataclasses import dataclass
from typing import Annotated

from ..files import Device, Dtype, Model, check_dtype

_HOST_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class ChatOptions:
    """How to answer."""

    max_new_tokens: Annotated[int, "longest answer", "N"] = 128
    temperature: Annotated[float | None, "0: the likeliest token (default: as the checkpoint says)", "T"] = None
    seed: Annotated[int, "of sampling with a temperature", "N"] = 0
    dtype: Dtype = "auto"
    device: Device = None
    system: Annotated[str | None, "system message that opens the conversation", "TEXT"] = None

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens {self.max_new_tokens} makes no answer; give 1 or more")
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise ValueError(f"--temperature {self.temperature} must be 0 (the likeliest token) or a number above it")
        check_dtype(self.dtype)


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(ChatOptions):
    """Chat with a checkpoint.

    Chat with a GRIN-MoE checkpoint, answers streamed. Without --prompt a conversation on the terminal: /reset
    forgets it, /quit (or end of input) ends it.

    example: grinmoe generate --model demo-output/model --prompt "What is AI?"
    """

    model: Model
    prompt: Annotated[str | None, "one message; without it, a conversation", "TEXT"] = None


@dataclass(frozen=True)
class ServeOptions:
    """Serve a checkpoint to OpenAI clients.

    Serve a GRIN-MoE checkpoint over HTTP with OpenAI's API (chat completions and completions, also streamed), many
    requests at a time. The line that says it is ready names the address. Ctrl-C or SIGTERM ends it.

    example: grinmoe serve --model demo-output/model --port 8000
    """

    model: Model
    name: Annotated[str | None, "what requests call the model (default: the folder's name, or the Hub id)", "NAME"] = (
        None
    )
    host: Annotated[str, "address to listen at; 127.0.0.1 is this machine alone"] = "127.0.0.1"
    port: Annotated[int, "0: a free one", "N"] = 8000
    dtype: Dtype = "auto"
    device: Device = None
    continuous_batching: Annotated[bool, "one request after the other, with generate()"] = True
    max_length: Annotated[int | None, "most tokens of prompt and answer (default: the model's own limit)", "N"] = None
    max_new_tokens: Annotated[int | None, "longest answer (default: what the prompt leaves)", "N"] = None
    cache_tokens: Annotated[
        int | None, "tokens in memory, of all requests (default: what an accelerator has room for; 16384 on a CPU)", "N"
    ] = None
    api_key_file: Annotated[
        str | None, "file with the key that clients have to present, in one line (default: no key is asked for)", "FILE"
    ] = None
    allowed_host: Annotated[
        tuple[str, ...],
        "more names that clients reach this server by, such as a reverse proxy's; '*': any (default: those of this machine)",
        "NAME",
    ] = ()
    max_requests: Annotated[int, "prompts that are answered or wait at a time; more get 429", "N"] = 256
    max_connections: Annotated[
        int | None, "connections at a time (default: 512, or what the limit of open files has room for)", "N"
    ] = None
    request_timeout: Annotated[float, "seconds in which a request has to arrive whole", "S"] = 30.0

    def __post_init__(self):
        if not 0 <= self.port <= 65535:
            raise ValueError(f"--port {self.port} is no port; give 1 to 65535, or 0 for a free one")
        for option in ("max_requests", "max_connections"):
            if (value := getattr(self, option)) is not None and value < 1:
                raise ValueError(f"--{option.replace('_', '-')} {value} answers nobody; give 1 or more")
        if not 0 < self.request_timeout < math.inf:
            raise ValueError(f"--request-timeout {self.request_timeout} must be a number of seconds above 0")
        for name in self.allowed_host:
            # Anything else never equals what a request names, and a pattern would look as if it did.
            if name != "*" and not _HOST_NAME.fullmatch(name):
                raise ValueError(
                    f"--allowed-host {name!r} must be a host name without scheme and port, such as models.example.org, or "
                    "'*' for any; give the option once for each name, and letters beyond ASCII in the form of xn--"
                )
        for option in ("max_length", "max_new_tokens", "cache_tokens"):
            value, lowest = getattr(self, option), 2 if option == "max_length" else 1
            if value is not None and value < lowest:
                raise ValueError(
                    f"--{option.replace('_', '-')} {value} leaves no room for an answer; give {lowest} or more"
                )
        if self.cache_tokens is not None and not self.continuous_batching:
            raise ValueError(
                "--cache-tokens is for continuous batching; leave out one of it and --no-continuous-batching"
            )
        if self.name is not None and not self.name.strip():
            raise ValueError("--name is empty; give the name that requests call the model by, or leave it out")
        check_dtype(self.dtype)
