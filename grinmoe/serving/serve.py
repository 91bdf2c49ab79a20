"""`grinmoe serve`: a checkpoint behind an HTTP server with OpenAI's API, which is Transformers' own."""

from __future__ import annotations

import dataclasses
import errno
import ipaddress
import math
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import ContinuousBatchingConfig
from transformers.utils import logging
from transformers.utils.import_utils import is_psutil_available, is_serve_available

from ..files import folder_or_repository
from ..loading import load_for_use
from .options import ServeOptions

if TYPE_CHECKING:
    from .batching import Batches, OneAtATime, ServedModel

# Of a CPU's memory the library would plan with most; that is for a machine which does nothing else.
CPU_CACHE_TOKENS = 16384
# Tokens that a CPU computes in one step. Longer prompts are computed in parts, between which other requests go on.
CPU_STEP_TOKENS = 512
DEFAULT_CONNECTIONS, FEWEST_CONNECTIONS = 512, 16
# File descriptors that the process may need for something else than connections, while it serves.
SPARE_FILES = 48


def run_serve(options: ServeOptions) -> None:
    """
    The command: load the model, then answer requests until SIGTERM or Ctrl-C.

    Args:
        options: what to serve, and where.

    Raises:
        ValueError: the port cannot be used, or the checkpoint (see GrinMoeForCausalLM.from_pretrained).
        OSError: there is no such folder or repository.
        ImportError: a package is missing.
        SystemExit: 0, on SIGTERM.
        KeyboardInterrupt: on Ctrl-C.
    """
    _check_packages(options)
    from .access import Access, read_api_key
    from .http import Server
    from .server import build_app, default_limits

    source = folder_or_repository(options.model, "--model")
    api_key = None if options.api_key_file is None else read_api_key(options.api_key_file)
    max_connections = _max_connections(options)
    # Before the weights: loading them takes minutes, and the port may be taken.
    with _leaving_on_sigterm(), _bound_socket(options.host, options.port) as listener:
        served, manager = _load(source, options)
        try:
            # Warnings are for who calls the library: one for each request that came, or was too long and is refused.
            logging.set_verbosity_error()
            access = Access.at(options.host, listener.getsockname()[0], options.allowed_host, api_key)
            limits = dataclasses.replace(
                default_limits(served),
                max_connections=max_connections,
                max_requests=options.max_requests,
                request_timeout=options.request_timeout,
            )
            app = build_app(served, manager, access, limits)
            _warn_of_open_access(listener, api_key)
            _listen(listener, options)
            print(_ready(listener, served), flush=True)
            # Ends by raising the signal again that ended it.
            Server(app, manager.stop).run(sockets=[listener])
        finally:
            manager.stop()


def _max_connections(options: ServeOptions) -> int:
    """So many connections that accepting one never fails for want of a file descriptor."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return options.max_connections or DEFAULT_CONNECTIONS
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if most == resource.RLIM_INFINITY:
        return options.max_connections or DEFAULT_CONNECTIONS
    room = most - len(os.listdir("/dev/fd")) - SPARE_FILES
    if room < max(options.max_connections or 0, FEWEST_CONNECTIONS):
        raise ValueError(
            f"the limit of open files (ulimit -n) is {most} and leaves room for {max(room, 0)} connections, too few for "
            f"--max-connections {options.max_connections or FEWEST_CONNECTIONS}; raise the limit, or lower the option"
        )
    return options.max_connections or min(DEFAULT_CONNECTIONS, room)


def _warn_of_open_access(listener: socket.socket, api_key: bytes | None) -> None:
    address, port = listener.getsockname()[:2]
    if api_key is None and not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        print(
            f"grinmoe serve: warning: everyone who can reach port {port} of this machine ({address}) can use the model and "
            "read what it answers to them, without a key; give --api-key-file FILE, or listen at 127.0.0.1 (the default)",
            file=sys.stderr,
            flush=True,
        )


def _check_packages(options: ServeOptions) -> None:
    # psutil: on a CPU the library asks it for the memory that a paged cache may take.
    if not is_serve_available() or (options.continuous_batching and not is_psutil_available()):
        raise ImportError("the server needs fastapi, uvicorn, openai and psutil; pip install 'grinmoe[serve]'")


@contextmanager
def _leaving_on_sigterm() -> Iterator[None]:
    """SIGTERM ends the command as it should end, with exit code 0."""

    def leave(_signal: int, _frame: Any) -> None:
        raise SystemExit(0)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _bound_socket(host: str, port: int) -> socket.socket:
    """A socket that has the port and does not listen yet: until the model is loaded, connections are refused."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise ValueError(f"--host {host} is no address ({error}); give a name or number of this machine") from error
    listener = socket.socket(family, kind, protocol)
    try:
        # A port whose last connections are still closing may be used again.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _no_port(error, host, port) from error
    return listener


def _listen(listener: socket.socket, options: ServeOptions) -> None:
    try:
        listener.listen(2048)
    except OSError as error:
        raise _no_port(error, options.host, options.port) from error


def _no_port(error: OSError, host: str, port: int) -> ValueError:
    if error.errno == errno.EADDRINUSE:
        return ValueError(f"port {port} of {host} is in use; end what listens there, or choose another with --port")
    if error.errno == errno.EACCES:
        return ValueError(f"port {port} needs the rights of an administrator; choose one above 1023 with --port")
    if error.errno == errno.EADDRNOTAVAIL:
        return ValueError(f"--host {host} is not an address of this machine; 127.0.0.1 or 0.0.0.0 always are")
    return ValueError(f"--host {host} --port {port} cannot be used ({error.strerror})")


def _load(source: str, options: ServeOptions) -> tuple[ServedModel, OneAtATime | Batches]:
    """The model with its limits, and how it generates."""
    from .batching import Batches, OneAtATime, ServedModel, start_batching

    model, tokenizer = load_for_use(source, options.dtype, options.device)
    # An adapter's weights are in the layers of its base, which is what can be batched.
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    max_length = _max_length(model, options)
    if options.continuous_batching and len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise ValueError(
            f"--device {options.device} has spread this model over several devices, which continuous batching does not do; "
            "add --no-continuous-batching, or serve a quantised checkpoint on one"
        )
    batch = None
    if options.continuous_batching:
        try:
            batch, capacity = start_batching(model, _batching(model, options))
        except MemoryError as error:
            raise ValueError(f"the requests' cache does not fit into memory ({error}); lower --cache-tokens") from error
        max_length = min(max_length, capacity)
    served = ServedModel(
        model=model,
        tokenizer=tokenizer,
        name=options.name or (Path(source).resolve().name if Path(source).is_dir() else source),
        max_length=max_length,
        max_new_tokens=min(options.max_new_tokens or max_length, max_length - 1),
        continuous_batching=options.continuous_batching,
    )
    return served, OneAtATime(served) if batch is None else Batches(served, batch)


def _max_length(model: Any, options: ServeOptions) -> int:
    """Tokens of a prompt and its answer together that the model was made for, or fewer if that is asked for."""
    longest = model.config.max_position_embeddings
    rotary = model.model.rotary_emb
    if options.continuous_batching and rotary.first_long_length is not None:
        # Beyond it the frequencies of all positions change, which a cache that requests share cannot follow.
        longest = min(longest, rotary.first_long_length)
    if options.max_length is None:
        return longest
    if options.max_length > longest:
        raise ValueError(f"--max-length {options.max_length} is more than this model serves; give {longest} or less")
    return options.max_length


def _batching(model: Any, options: ServeOptions) -> ContinuousBatchingConfig:
    from .batching import BLOCK_TOKENS

    on_cpu = model.device.type == "cpu"
    cache_tokens = options.cache_tokens or (CPU_CACHE_TOKENS if on_cpu else None)
    return ContinuousBatchingConfig(
        per_request_processors=True,
        num_blocks=None if cache_tokens is None else math.ceil(cache_tokens / BLOCK_TOKENS),
        max_batch_tokens=CPU_STEP_TOKENS if on_cpu else None,
    )


def _ready(listener: socket.socket, served: ServedModel) -> str:
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"
    how = "continuous batching" if served.continuous_batching else "one request at a time"
    return f"{served.name} is ready at {url} ({served.max_length} tokens for prompt and answer, {how}); Ctrl-C ends it"
