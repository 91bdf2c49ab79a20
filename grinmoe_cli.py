"""The command line of grinmoe: parsers, and errors in one line.

This module stands beside the package, not in it: importing `grinmoe` registers the model with Transformers and takes
seconds, and `grinmoe --help` should not. Each command imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import warnings

# Task -> what it is, what its description adds, a recipe of recipes/ for the example.
_TRAINING = {
    "sft": (
        "fine-tune on chats, prompts with answers, or text",
        "Supervised fine-tuning: the loss is over the assistant's text (or the completion, or all).",
        "sft_qlora.yaml",
    ),
    "dpo": (
        "train on preferences: a chosen and a rejected answer to each prompt",
        "Direct preference optimisation with TRL's DPOTrainer.",
        "dpo_qlora.yaml",
    ),
    "pretrain": (
        "train on plain text, from scratch or on from a checkpoint",
        "Texts are joined and cut into rows of max_length; attention does not cross from one text into another.",
        "pretrain_small.yaml",
    ),
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="grinmoe",
        description="GRIN-MoE for Hugging Face Transformers: train, load and talk to mixture-of-experts models.",
        epilog="example: grinmoe demo --output demo-output",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    _add_demo(commands)
    _add_generate(commands)
    for task in _TRAINING:
        _add_training(commands, task)
    _add_merge(commands)
    _add_plan(commands)
    _add_compare(commands)
    _add_tokenizer(commands)
    _add_push(commands)
    _add_pull(commands)
    return parser


def _add_demo(commands) -> None:
    demo = commands.add_parser(
        "demo",
        help="train a small GRIN MoE on real text, save it, load it elsewhere and talk to it",
        description="Train a small GRIN MoE from scratch on the question-answer pairs of chatterbot-corpus, evaluate it, "
        "save it with its code, load it in a process without this package, and chat with it. About 2 minutes on 2 cores.",
        epilog="example: grinmoe demo --output demo-output",
    )
    demo.add_argument("--output", required=True, metavar="DIR", help="new folder, or that of an earlier demo")
    demo.add_argument("--steps", type=int, default=None, metavar="N", help="optimizer steps (default: about 2 minutes)")
    demo.add_argument("--seed", type=int, default=0, metavar="N", help="of initialisation, data order and routing")
    demo.set_defaults(run=_run_demo)


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


def _add_training(commands, task: str) -> None:
    purpose, description, recipe = _TRAINING[task]
    training = commands.add_parser(
        task,
        help=purpose,
        description=f"{description} Settings come from a YAML file, and from flags, which win: --key value for every key "
        "that a file may have. Most are those of Transformers' TrainingArguments; --options lists all. SIGTERM and Ctrl-C "
        "end a run with a checkpoint; the same command goes on from it, and after any other end.",
        epilog=f"example: grinmoe {task} --config recipes/{recipe} --learning_rate 1e-4 --output_dir runs/{task}",
        allow_abbrev=False,
    )
    training.add_argument("--config", metavar="FILE", help="YAML; recipes/ has some to start from")
    training.add_argument("--options", action="store_true", help="list all keys and flags, and exit")
    training.set_defaults(run=_run_training, takes_settings=True)


def _add_merge(commands) -> None:
    merge = commands.add_parser(
        "merge",
        help="put an adapter into the weights of its base model",
        description="Merge a LoRA adapter into its base and save the result in the released layout, with code and "
        "tokenizer. The folder appears when it is complete; base and adapter stay as they are.",
        epilog="example: grinmoe merge --adapter runs/sft/adapter --output merged",
    )
    merge.add_argument("--adapter", required=True, metavar="DIR", help="folder of a PEFT adapter")
    merge.add_argument("--output", required=True, metavar="DIR", help="new or empty folder")
    merge.add_argument("--base", metavar="DIR_OR_HUB_ID", help="base model (default: as the adapter says)")
    merge.add_argument("--dtype", default="auto", help="of the result: auto (the base's), bfloat16, float16, float32")
    merge.add_argument(
        "--quantized-base",
        choices=["nf4", "fp4", "int8"],
        help="merge into the base as qlora saw it: quantised and back (default: into the base's own weights)",
    )
    merge.set_defaults(run=_run_merge)


def _add_plan(commands) -> None:
    plan = commands.add_parser(
        "plan",
        help="what fits: memory of a GPU, recipe and a bound on speed for a fine-tuning",
        description="Predict from config.json what a fine-tuning takes of each GPU, whether it fits, which recipe is for "
        "it, and what would fit instead. No weights are read. Exit code 0 whether it fits or not.",
        epilog="example: grinmoe plan --model microsoft/GRIN-MoE --method qlora --gpus 1 --gpu-memory-gib 80 "
        "--seq-length 2048 --batch-size 1",
    )
    plan.add_argument("--model", required=True, metavar="DIR_OR_HUB_ID", help="folder, or a repository of the Hub")
    plan.add_argument("--method", required=True, metavar="NAME", help="full, full-8bit, lora or qlora")
    plan.add_argument("--gpus", type=int, required=True, metavar="N", help="of all nodes; beyond 8 in nodes of 8")
    plan.add_argument("--gpu-memory-gib", type=float, required=True, metavar="X", help="of one GPU")
    plan.add_argument("--seq-length", type=int, required=True, metavar="S", help="tokens of a row")
    plan.add_argument("--batch-size", type=int, required=True, metavar="B", help="rows of one GPU's micro-batch")
    plan.add_argument(
        "--gradient-accumulation-steps", type=int, default=1, metavar="N", help="micro-batches of a step (default: 1)"
    )
    plan.add_argument("--no-gradient-checkpointing", action="store_true", help="keep all activations")
    plan.add_argument("--cpu-offload", action="store_true", help="weights and optimizer on the host (FSDP2)")
    plan.add_argument(
        "--shard-across-nodes", action="store_true", help="share weights among all GPUs, not within a node"
    )
    plan.add_argument("--packing", action="store_true", help="rows hold several texts")
    plan.add_argument("--lora-r", type=int, default=16, metavar="R", help="rank (default: 16)")
    plan.add_argument(
        "--lora-targets", choices=["all", "attention", "experts"], default="all", help="what is adapted (default: all)"
    )
    plan.add_argument("--shared-a", action="store_true", help="one A for all experts of a layer")
    plan.add_argument("--tflops", type=float, default=790.0, metavar="X", help="bf16 rate of a GPU (default: 790)")
    plan.add_argument("--json", action="store_true", help="print one JSON object")
    plan.set_defaults(run=_run_plan)


def _add_compare(commands) -> None:
    compare = commands.add_parser(
        "compare",
        help="train small models with every estimator of the router's gradient, and compare them",
        description="Train small models from the same weights, on the same batches in the same order, with every "
        "estimator, two kinds of balance and a dense twin; write a table, a figure and all numbers. Complete runs are "
        "kept: an interrupted comparison goes on. About an hour on 2 cores; on a GPU models and data are larger.",
        epilog="example: grinmoe compare --output comparison --seeds 1 --steps 60 --arms topk v2 togo",
    )
    compare.add_argument("--output", required=True, metavar="DIR", help="new folder, or one to go on in")
    compare.add_argument("--seeds", type=int, metavar="N", help="runs per arm (default: 3)")
    compare.add_argument("--steps", type=int, metavar="N", help="optimizer steps of a run (default: 400; GPU: 1500)")
    compare.add_argument(
        "--arms", nargs="+", metavar="NAME", help="some arms only (default: all; an unknown one lists them)"
    )
    compare.add_argument("--text", metavar="FILE", help="UTF-8 text (default: documentation of the installed packages)")
    compare.add_argument("--workers", type=int, metavar="N", help="runs at a time (default: one per core, 4 on a GPU)")
    compare.set_defaults(run=_run_compare)


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


def _run_demo(arguments: argparse.Namespace) -> None:
    from grinmoe.demo import run_demo

    run_demo(arguments.output, steps=arguments.steps, seed=arguments.seed)


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


def _run_training(arguments: argparse.Namespace) -> int:
    from grinmoe.recipe import option_help, read_recipe

    if arguments.options:
        print(option_help(arguments.command))
        return 0
    given = [] if arguments.config is None else ["--config", arguments.config]
    recipe = read_recipe(arguments.command, [*given, *arguments.settings])
    from grinmoe.training import train

    command = shlex.join(["grinmoe", arguments.command, *given, *arguments.settings])
    return 130 if train(recipe, command).signal == "SIGINT" else 0


def _run_merge(arguments: argparse.Namespace) -> None:
    from grinmoe.merge import run_merge

    run_merge(arguments.adapter, arguments.output, arguments.base, arguments.dtype, arguments.quantized_base)


def _run_plan(arguments: argparse.Namespace) -> None:
    from grinmoe.plan import PlanOptions, run_plan

    options = PlanOptions(
        model=arguments.model,
        method=arguments.method,
        gpus=arguments.gpus,
        gpu_memory_gib=arguments.gpu_memory_gib,
        seq_length=arguments.seq_length,
        batch_size=arguments.batch_size,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        gradient_checkpointing=not arguments.no_gradient_checkpointing,
        cpu_offload=arguments.cpu_offload,
        shard_across_nodes=arguments.shard_across_nodes,
        lora_r=arguments.lora_r,
        lora_attention=arguments.lora_targets != "experts",
        lora_experts=arguments.lora_targets != "attention",
        shared_a=arguments.shared_a,
        packing=arguments.packing,
        tflops=arguments.tflops,
    )
    run_plan(options, as_json=arguments.json)


def _run_compare(arguments: argparse.Namespace) -> None:
    from grinmoe.comparison import RunsFailedError, run_comparison, settings_here

    settings = settings_here(seeds=arguments.seeds, steps=arguments.steps)
    try:
        report = run_comparison(
            arguments.output,
            settings,
            arms=arguments.arms,
            text=arguments.text,
            workers=arguments.workers,
            command=shlex.join(["grinmoe", *sys.argv[1:]]),
        )
    except RunsFailedError as error:
        raise SystemExit(f"grinmoe compare: {error}") from error
    print(f"table and figure: {report}")


def _run_tokenizer_build(arguments: argparse.Namespace) -> None:
    from grinmoe.tokenization.build import run_build

    run_build(arguments.source, arguments.output, model_max_length=arguments.model_max_length)


def _run_tokenizer_verify(arguments: argparse.Namespace) -> None:
    from grinmoe.tokenization.verify import run_verify

    if not run_verify(arguments.tokenizer, arguments.vectors, auto=arguments.auto):
        raise SystemExit(1)


def _run_push(arguments: argparse.Namespace) -> None:
    from grinmoe.hub import PushOptions, push
    from grinmoe.model_card import CardOverrides
    from grinmoe.release import ReleaseOptions

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


def _run_pull(arguments: argparse.Namespace) -> None:
    from grinmoe.hub import pull

    pull(arguments.repo, arguments.output, revision=arguments.revision)


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 2 for what the user can mend, 130 when interrupted."""
    parser = build_parser()
    arguments, arguments_left = parser.parse_known_args(argv)
    if getattr(arguments, "takes_settings", False):
        arguments.settings = arguments_left
    elif arguments_left:
        parser.error(f"unrecognized arguments: {' '.join(arguments_left)}")
    if arguments.version:
        print(f"grinmoe {_version()}")
        return 0
    if arguments.command is None:
        parser.print_help()
        return 0
    # Of the libraries among themselves; nothing that a user of a command could change.
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        return arguments.run(arguments) or 0
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, less) is gone; nothing is left to say.
        sys.stderr.close()
        return 0
    except (ValueError, OSError, ImportError) as error:
        print(f"grinmoe {arguments.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("grinmoe")
    except PackageNotFoundError:
        return "0+unknown (run from a checkout that is not installed)"


if __name__ == "__main__":
    sys.exit(main())
