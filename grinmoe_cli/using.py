"""Commands that use a model: generate, serve, analyze, evaluate, export."""

from __future__ import annotations

import argparse
import shlex
import sys

_DEVICE = (
    "cpu, cuda, cuda:1, ...; auto spreads the layers over all accelerators (default: an accelerator if there is one)"
)


def add_commands(commands) -> None:
    _add_generate(commands)
    _add_serve(commands)
    _add_evaluate(commands)
    _add_export(commands)
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
    generate.add_argument("--device", default=None, help=_DEVICE)
    generate.set_defaults(run=_run_generate)


def _run_generate(arguments: argparse.Namespace) -> None:
    from grinmoe.serving import ChatOptions, run_generate

    options = ChatOptions(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
        dtype=arguments.dtype,
        device=arguments.device,
        system=arguments.system,
    )
    run_generate(arguments.model, arguments.prompt, options)


def _add_serve(commands) -> None:
    serve = commands.add_parser(
        "serve",
        help="serve a checkpoint to OpenAI clients",
        description="Serve a GRIN-MoE checkpoint over HTTP with OpenAI's API (chat completions and completions, also "
        "streamed), many requests at a time. The line that says it is ready names the address. Ctrl-C or SIGTERM ends it.",
        epilog="example: grinmoe serve --model demo-output/model --port 8000",
    )
    serve.add_argument(
        "--model",
        required=True,
        metavar="DIR_OR_HUB_ID",
        help="folder of a model or adapter, or a repository of the Hub",
    )
    serve.add_argument(
        "--name", metavar="NAME", help="what requests call the model (default: the folder's name, or the Hub id)"
    )
    serve.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine)")
    serve.add_argument("--port", type=int, default=8000, metavar="N", help="0: a free one (default: 8000)")
    serve.add_argument("--dtype", default="auto", help="auto (the checkpoint's, default), bfloat16, float16, float32")
    serve.add_argument("--device", default=None, help=_DEVICE)
    serve.add_argument(
        "--no-continuous-batching", action="store_true", help="one request after the other, with generate()"
    )
    serve.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="most tokens of a prompt and its answer together (default: what the model was made for)",
    )
    serve.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="longest answer (default: what the prompt leaves)"
    )
    serve.add_argument(
        "--cache-tokens",
        type=int,
        metavar="N",
        help="tokens that are kept in memory, of all requests (default: what an accelerator has room for; 16384 on a CPU)",
    )
    serve.set_defaults(run=_run_serve)


def _run_serve(arguments: argparse.Namespace) -> None:
    from grinmoe.serving import ServeOptions, run_serve

    options = ServeOptions(
        model=arguments.model,
        name=arguments.name,
        host=arguments.host,
        port=arguments.port,
        dtype=arguments.dtype,
        device=arguments.device,
        continuous_batching=not arguments.no_continuous_batching,
        max_length=arguments.max_length,
        max_new_tokens=arguments.max_new_tokens,
        cache_tokens=arguments.cache_tokens,
    )
    run_serve(options)


def _add_export(commands) -> None:
    export = commands.add_parser(
        "export",
        help="write a checkpoint for other programs, or of another model, dtype or shard size",
        description="Convert a checkpoint, shard by shard: to phimoe, which Transformers' own class, vLLM and SGLang load "
        "without code (a model with RMSNorm and top-k gating: to mixtral); to safetensors, a GRIN-MoE of another dtype or "
        "shard size, also from a phimoe (Phi-3.5-MoE, Phi-mini-MoE, Phi-tiny-MoE) or a Mixtral; or to gguf, by "
        "llama.cpp's converter. The folder appears when it is complete.",
        epilog="example: grinmoe export --model demo-output/model --to phimoe --output demo-phimoe",
    )
    export.add_argument("--model", required=True, metavar="DIR_OR_HUB_ID", help="folder, or a repository of the Hub")
    export.add_argument(
        "--to", required=True, choices=["safetensors", "phimoe", "mixtral", "gguf"], help="what is written"
    )
    export.add_argument("--output", required=True, metavar="DIR", help="new or empty folder")
    export.add_argument(
        "--dtype",
        default="auto",
        help="auto (as it is, default), bfloat16, float16, float32; int8 for safetensors and gguf",
    )
    export.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="such as 500MB (default: 5GB)")
    export.add_argument(
        "--no-compare", action="store_true", help="do not load both and show how far their logits are apart"
    )
    export.add_argument(
        "--converter", metavar="PATH", help="llama.cpp's folder (gguf; default: the script on the PATH)"
    )
    export.set_defaults(run=_run_export)


def _run_export(arguments: argparse.Namespace) -> None:
    from grinmoe.conversion import ExportOptions, run_export

    options = ExportOptions(
        model=arguments.model,
        to=arguments.to,
        output=arguments.output,
        dtype=arguments.dtype,
        max_shard_size=arguments.max_shard_size,
        compare=not arguments.no_compare,
        converter=arguments.converter,
    )
    run_export(options)


def _add_evaluate(commands) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="scores by lm-eval, with those of the paper beside them",
        description="Run tasks of lm-eval on a checkpoint and write a table, with the paper's scores where a task is of its "
        "Table 2, and evaluations.json for the model card. Complete tasks are kept: an interrupted evaluation goes on. "
        "Tasks: names of the paper's suite (mmlu, arc_c, gsm8k, ...; paper is all of it), other names of lm-eval, or files "
        "of JSON lines, which need no network.",
        epilog="example: grinmoe evaluate --model microsoft/GRIN-MoE --tasks arc_c gsm8k --output evaluation",
    )
    evaluate.add_argument("--model", required=True, metavar="DIR_OR_HUB_ID", help="folder, or a repository of the Hub")
    evaluate.add_argument("--tasks", required=True, nargs="+", metavar="NAME", help="names, or .jsonl files")
    evaluate.add_argument("--output", required=True, metavar="DIR", help="new folder, or one to go on in")
    evaluate.add_argument("--limit", type=int, metavar="N", help="questions of a task, to try it (measures nothing)")
    evaluate.add_argument("--shots", type=int, metavar="N", help="examples in the prompt (default: the suite's)")
    evaluate.add_argument("--batch-size", type=int, default=8, metavar="B", help="rows at a time (default: 8)")
    evaluate.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float16", "float32"])
    evaluate.add_argument("--device", default=None, help=_DEVICE)
    evaluate.add_argument("--chat", action="store_true", help="put prompts into the chat template")
    evaluate.add_argument(
        "--allow-code", action="store_true", help="run the programs that the model writes (HumanEval, MBPP)"
    )
    evaluate.set_defaults(run=_run_evaluate)


def _run_evaluate(arguments: argparse.Namespace) -> None:
    from grinmoe.evaluation import EvaluateOptions, run_evaluate

    options = EvaluateOptions(
        model=arguments.model,
        tasks=tuple(arguments.tasks),
        output=arguments.output,
        limit=arguments.limit,
        shots=arguments.shots,
        batch_size=arguments.batch_size,
        dtype=arguments.dtype,
        device=arguments.device,
        chat=arguments.chat,
        allow_code=arguments.allow_code,
    )
    run_evaluate(options, shlex.join(["grinmoe", *sys.argv[1:]]))


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
    analyze.add_argument("--device", default=None, help=_DEVICE)
    analyze.set_defaults(run=_run_analyze)


def _run_analyze(arguments: argparse.Namespace) -> None:
    from grinmoe.analysis import AnalyzeOptions, run_analyze

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
