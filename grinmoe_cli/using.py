"""Commands that use a model: generate, analyze."""

from __future__ import annotations

import argparse
import shlex
import sys


def add_commands(commands) -> None:
    _add_generate(commands)
    _add_analyze(commands)


def _add_generate(commands) -> None:
    generate = commands.add_parser(
        "generate",
        help="chat with a checkpoint",
        description="Chat with a GRIN-MoE checkpoint, answers streamed. Without --prompt a conversation on the terminal: "
        "/reset forgets it, /quit (or end of input) ends it.",
        epilog='example: grinmoe generate --model demo-output/model --prompt "What is AI?"',
    )
    generate.add_argument(
        "--model",
        required=True,
        metavar="DIR_OR_HUB_ID",
        help="folder of a model or adapter, or a repository of the Hub",
    )
    generate.add_argument("--prompt", metavar="TEXT", help="one message; without it, a conversation")
    generate.add_argument("--system", metavar="TEXT", help="system message that opens the conversation")
    generate.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="longest answer (default: 128)")
    generate.add_argument(
        "--temperature", type=float, metavar="T", help="0: the likeliest token (default: as the checkpoint says)"
    )
    generate.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling with a temperature")
    generate.add_argument(
        "--dtype", default="auto", help="auto (the checkpoint's, default), bfloat16, float16, float32"
    )
    generate.add_argument("--device", default=None, help="cpu, cuda, ... (default: an accelerator if there is one)")
    generate.set_defaults(run=_run_generate)


def _run_generate(arguments: argparse.Namespace) -> None:
    from grinmoe.generate import ChatOptions, run_generate

    options = ChatOptions(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
        dtype=arguments.dtype,
        device=arguments.device,
        system=arguments.system,
    )
    run_generate(arguments.model, arguments.prompt, options)


def _add_analyze(commands) -> None:
    analyze = commands.add_parser(
        "analyze",
        help="report how a checkpoint routes texts to its experts",
        description="Route texts and report what the routers do: load of the experts, similarity of domains, near ties, "
        "experts chosen together, and a sentence token by token. The folder gets report.html, which works offline, its "
        "pictures, and the data as JSON and Parquet; it appears when it is complete.",
        epilog="example: grinmoe analyze --model demo-output/model --text talk.jsonl manual.txt --output routing",
    )
    analyze.add_argument(
        "--model",
        required=True,
        metavar="DIR_OR_HUB_ID",
        help="folder of a model or adapter, or a repository of the Hub",
    )
    analyze.add_argument(
        "--text",
        required=True,
        nargs="+",
        metavar="FILE",
        help="texts in UTF-8, or task sets (.json, .jsonl, .parquet with text, messages, or prompt and completion); each "
        "file is a domain",
    )
    analyze.add_argument("--output", required=True, metavar="DIR", help="new or empty folder")
    analyze.add_argument(
        "--sentence", metavar="TEXT", help="to show token by token (default: the first one of the first text)"
    )
    analyze.add_argument(
        "--max-tokens", type=int, default=16384, metavar="N", help="of each domain, from its beginning (default: 16384)"
    )
    analyze.add_argument(
        "--max-length",
        type=int,
        default=None,
        metavar="N",
        help="tokens of a row (default: 512, or what the model was made for if that is less)",
    )
    analyze.add_argument("--dtype", default="auto", help="auto (the checkpoint's, default), bfloat16, float16, float32")
    analyze.add_argument("--device", default=None, help="cpu, cuda, ... (default: an accelerator if there is one)")
    analyze.set_defaults(run=_run_analyze)


def _run_analyze(arguments: argparse.Namespace) -> None:
    from grinmoe.analyze import AnalyzeOptions, run_analyze

    options = AnalyzeOptions(
        model=arguments.model,
        text=tuple(arguments.text),
        output=arguments.output,
        sentence=arguments.sentence,
        max_tokens=arguments.max_tokens,
        max_length=arguments.max_length,
        dtype=arguments.dtype,
        device=arguments.device,
        command=shlex.join(["grinmoe", *sys.argv[1:]]),
    )
    run_analyze(options)
