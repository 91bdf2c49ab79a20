"""`grinmoe generate` and `grinmoe serve`: chat on a terminal, and OpenAI's API over HTTP."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .chat import Chat, run_generate
    from .options import ChatOptions, GenerateOptions, ServeOptions
    from .serve import run_serve

# Each name is imported when it is first asked for: these modules need different optional packages.
_MODULES = {
    "Chat": "chat",
    "ChatOptions": "options",
    "GenerateOptions": "options",
    "run_generate": "chat",
    "ServeOptions": "options",
    "run_serve": "serve",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


__all__ = [
    "Chat",
    "ChatOptions",
    "GenerateOptions",
    "ServeOptions",
    "run_generate",
    "run_serve",
]
