"""Commands around the Hub: tokenizer, push, pull."""

from __future__ import annotations

import argparse


def add_commands(commands) -> None:
    _add_tokenizer(commands)
    _add_push(commands)
    _add_pull(commands)


def _add_tokenizer(commands) -> None:
    tokenizer = commands.add_parser(
        "tokenizer",
        help="build the family's tokenizer from a source, or verify one",
        description="Build a tokenizer of the family, or hold one against strings and their ids.",
        epilog="example: grinmoe tokenizer build --source tokenizer.model --output tokenizer",
    )
    actions = tokenizer.add_subparsers(dest="action", metavar="ACTION", required=True)
    build = actions.add_parser(
        "build",
        help="make a tokenizer folder of a tokenizer.model, a GGUF or a tokenizer.json",
        description="Take vocabulary and merges from a SentencePiece BPE model, a GGUF or a tokenizer.json (also one whose "
        "normaliser was lost when another class saved it), put the family's normalisation, special tokens and chat template "
        "on, and write a tokenizer that loads with TokenizersBackend and AutoTokenizer.",
        epilog="example: grinmoe tokenizer build --source tokenizer.model --output tokenizer",
    )
    build.add_argument("--source", required=True, metavar="FILE", help="tokenizer.model, *.gguf or tokenizer.json")
    build.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="new folder, or one with a tokenizer or model, where only the tokenizer is replaced",
    )
    build.add_argument(
        "--model-max-length", type=int, default=4096, metavar="N", help="tokens from which it warns (default: 4096)"
    )
    build.set_defaults(run=_run_tokenizer_build)
    verify = actions.add_parser(
        "verify",
        help="compare a tokenizer with strings and their ids",
        description="Compare what a tokenizer gives with vectors: a JSON object from string to ids, or llama.cpp's *.inp "
        "and *.out. Prints each difference with the place where it begins. Exit code 0 if all agree, 1 if not.",
        epilog="example: grinmoe tokenizer verify --tokenizer tokenizer --vectors ids.json",
    )
    verify.add_argument("--tokenizer", required=True, metavar="DIR", help="folder of a tokenizer or of a model")
    verify.add_argument("--vectors", required=True, metavar="FILE", help="*.json, or *.inp with its *.out beside it")
    verify.add_argument("--auto", action="store_true", help="load with AutoTokenizer, as it is after `import grinmoe`")
    verify.set_defaults(run=_run_tokenizer_verify)


def _run_tokenizer_build(arguments: argparse.Namespace) -> None:
    from grinmoe.tokenization.build import run_build

    run_build(arguments.source, arguments.output, model_max_length=arguments.model_max_length)


def _run_tokenizer_verify(arguments: argparse.Namespace) -> None:
    from grinmoe.tokenization.verify import run_verify

    if not run_verify(arguments.tokenizer, arguments.vectors, auto=arguments.auto):
        raise SystemExit(1)


def _add_push(commands) -> None:
    push = commands.add_parser(
        "push",
        help="publish a checkpoint or an adapter on the Hub, checked before",
        description="Assemble what belongs to a release (weights, config, code, tokenizer, card), check it (loads without "
        "this package, same logits; no pickles, secrets, local paths or training state), show it, and publish "
        "it in one commit. An interrupted push goes on where it was. The token is that of `hf auth login` or HF_TOKEN.",
        epilog="example: grinmoe push --model demo-output/model --repo my-grin-moe --private --dry-run",
    )
    push.add_argument("--model", required=True, metavar="DIR", help="folder of a checkpoint or a PEFT adapter")
    push.add_argument("--repo", required=True, metavar="NAME", help="NAME or OWNER/NAME; made if it is not there")
    push.add_argument("--dry-run", action="store_true", help="assemble, check and show; send nothing")
    push.add_argument("--private", action="store_true", help="make the repository private")
    push.add_argument("--revision", metavar="BRANCH", help="branch; made if it is not there (default: main)")
    push.add_argument("--tag", metavar="NAME", help="tag the commit")
    push.add_argument("--create-pr", action="store_true", help="open a pull request in place of a commit")
    push.add_argument("--message", default="Upload GRIN-MoE", metavar="TEXT", help="of the commit")
    push.add_argument("--tokenizer", metavar="DIR", help="folder of the tokenizer (default: that of the model)")
    push.add_argument(
        "--own-template", action="store_true", help="the chat template differs from the family's on purpose"
    )
    push.add_argument(
        "--no-load-check", action="store_true", help="do not load the release (needs memory for the model)"
    )
    card = push.add_argument_group("model card", "wins over card.json and README.md in the folder")
    card.add_argument("--license", metavar="ID", help="such as mit")
    card.add_argument("--base-model", metavar="ID", help="on the Hub; an adapter needs it")
    card.add_argument("--datasets", nargs="+", metavar="ID", help="on the Hub")
    card.add_argument("--language", nargs="+", metavar="CODE", help="such as en")
    card.add_argument("--evaluations", metavar="FILE", help="JSON with results")
    push.set_defaults(run=_run_push)


def _run_push(arguments: argparse.Namespace) -> None:
    from grinmoe.hub import CardOverrides, PushOptions, ReleaseOptions, push

    card = CardOverrides(
        license=arguments.license,
        base_model=arguments.base_model,
        datasets=tuple(arguments.datasets) if arguments.datasets else None,
        language=tuple(arguments.language) if arguments.language else None,
        evaluations=arguments.evaluations,
    )
    release = ReleaseOptions(
        tokenizer=arguments.tokenizer,
        card=card,
        own_template=arguments.own_template,
        load_check=not arguments.no_load_check,
    )
    options = PushOptions(
        repo=arguments.repo,
        private=arguments.private,
        revision=arguments.revision,
        tag=arguments.tag,
        create_pr=arguments.create_pr,
        message=arguments.message,
        dry_run=arguments.dry_run,
        release=release,
    )
    push(arguments.model, options)


def _add_pull(commands) -> None:
    pull = commands.add_parser(
        "pull",
        help="download a checkpoint from the Hub, whole and checked",
        description="Download a repository of the Hub into a folder, without pickles, and check that the weights are those "
        "of its config. The folder appears when it is complete; an interrupted pull goes on where it was.",
        epilog="example: grinmoe pull --repo microsoft/GRIN-MoE --output GRIN-MoE",
    )
    pull.add_argument("--repo", required=True, metavar="NAME", help="OWNER/NAME on the Hub")
    pull.add_argument("--output", required=True, metavar="DIR", help="new or empty folder")
    pull.add_argument("--revision", metavar="REF", help="branch, tag or commit (default: main)")
    pull.set_defaults(run=_run_pull)


def _run_pull(arguments: argparse.Namespace) -> None:
    from grinmoe.hub import pull

    pull(arguments.repo, arguments.output, revision=arguments.revision)
