"""Commands that make a model: demo, sft, dpo, pretrain, merge, upcycle, plan, compare."""

from __future__ import annotations

import argparse
import shlex
import sys

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


def add_commands(commands) -> None:
    _add_demo(commands)
    for task in _TRAINING:
        _add_training(commands, task)
    _add_merge(commands)
    _add_upcycle(commands)
    _add_plan(commands)
    _add_compare(commands)


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


def _run_demo(arguments: argparse.Namespace) -> None:
    from grinmoe.demo import run_demo

    run_demo(arguments.output, steps=arguments.steps, seed=arguments.seed)


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


def _run_training(arguments: argparse.Namespace) -> int:
    from grinmoe.training import option_help, read_recipe

    if arguments.options:
        print(option_help(arguments.command))
        return 0
    given = [] if arguments.config is None else ["--config", arguments.config]
    recipe = read_recipe(arguments.command, [*given, *arguments.settings])
    from grinmoe.training import train

    command = shlex.join(["grinmoe", arguments.command, *given, *arguments.settings])
    return 130 if train(recipe, command).signal == "SIGINT" else 0


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


def _run_merge(arguments: argparse.Namespace) -> None:
    from grinmoe.adapters import run_merge

    run_merge(arguments.adapter, arguments.output, arguments.base, arguments.dtype, arguments.quantized_base)


def _add_upcycle(commands) -> None:
    upcycle = commands.add_parser(
        "upcycle",
        help="make a GRIN-MoE of a dense checkpoint, whose feed-forward every expert copies",
        description="Make a GRIN-MoE of a dense checkpoint (Llama, Mistral or Phi-3 layout): every expert copies its "
        "feed-forward, w2 is scaled so that the result begins where the dense model is, and the router is new. Train it "
        "then (grinmoe pretrain, sft). Shard by shard; the folder appears when it is complete.",
        epilog="example: grinmoe upcycle --model HuggingFaceTB/SmolLM2-360M --experts 8 --top-k 2 --output smol-moe",
    )
    upcycle.add_argument("--model", required=True, metavar="DIR_OR_HUB_ID", help="folder, or a repository of the Hub")
    upcycle.add_argument("--experts", required=True, type=int, metavar="E", help="experts of a layer")
    upcycle.add_argument("--top-k", required=True, type=int, metavar="K", help="experts of a token")
    upcycle.add_argument("--output", required=True, metavar="DIR", help="new or empty folder")
    upcycle.add_argument(
        "--noise", type=float, default=0.0, metavar="S", help="added to copies, in standard deviations (default: 0)"
    )
    upcycle.add_argument(
        "--reinit", type=float, default=0.0, metavar="SHARE", help="of every expert's neurons, begins anew (default: 0)"
    )
    upcycle.add_argument("--estimator", default="sparsemixer_v2", metavar="NAME", help="router_estimator of the result")
    upcycle.add_argument("--seed", type=int, default=0, metavar="N", help="of router, noise and neurons")
    upcycle.add_argument("--dtype", default="auto", help="auto (as it is, default), bfloat16, float16, float32")
    upcycle.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="such as 500MB (default: 5GB)")
    upcycle.add_argument("--no-compare", action="store_true", help="do not load both and compare their logits")
    upcycle.set_defaults(run=_run_upcycle)


def _run_upcycle(arguments: argparse.Namespace) -> None:
    from grinmoe.conversion import UpcycleOptions, run_upcycle

    options = UpcycleOptions(
        model=arguments.model,
        experts=arguments.experts,
        top_k=arguments.top_k,
        output=arguments.output,
        noise=arguments.noise,
        reinit=arguments.reinit,
        estimator=arguments.estimator,
        seed=arguments.seed,
        dtype=arguments.dtype,
        max_shard_size=arguments.max_shard_size,
        compare=not arguments.no_compare,
    )
    run_upcycle(options)


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


def _run_plan(arguments: argparse.Namespace) -> None:
    from grinmoe.planning import PlanOptions, run_plan

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


def _run_compare(arguments: argparse.Namespace) -> None:
    from grinmoe.research import RunsFailedError, run_comparison, settings_here

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
