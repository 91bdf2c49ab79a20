"""`grinmoe generate` and `grinmoe serve`: chat on a terminal, and OpenAI's API over HTTP. A captured step for GPUs."""

from .captured import CapturedDecoder, Sampling, generate_captured
from .chat import Chat, run_generate
from .options import ChatOptions, GenerateOptions, ServeOptions
from .serve import run_serve
