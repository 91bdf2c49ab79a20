"""`python -m benchmarks NAME`: run one benchmark and write its result under benchmarks/results/."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure, print, and write a dated report with hardware, versions and commit to benchmarks/results/.",
        epilog="example: python -m benchmarks block",
    )
    commands = parser.add_subparsers(dest="command", metavar="NAME", required=True)
    block = commands.add_parser(
        "block",
        help="one sparse block, forward and backward, against Transformers' own",
        epilog="example: python -m benchmarks block --rounds 20",
    )
    block.add_argument("--tokens", type=int, metavar="T", help="default: 1024, on a GPU 2048 to 32768")
    block.add_argument("--hidden-size", type=int, metavar="H", help="default: 512, on a GPU 4096")
    block.add_argument("--intermediate-size", type=int, metavar="I", help="default: 800, on a GPU 6400")
    block.add_argument("--experts", type=int, default=16, metavar="E")
    block.add_argument("--warmup", type=int, default=5, metavar="N", help="uncounted rounds (default: 5)")
    block.add_argument("--rounds", type=int, default=20, metavar="N", help="counted rounds (default: 20)")
    _add_limits(block)
    load = commands.add_parser(
        "load",
        help="memory and time of loading and saving a checkpoint, against Transformers' phimoe on the same files",
        epilog="example: python -m benchmarks load --layers 8",
    )
    load.add_argument("--layers", type=int, default=8, metavar="L", help="175 MB each in bfloat16 (default: 8)")
    load.add_argument("--rounds", type=int, default=3, metavar="N", help="processes per arm (default: 3)")
    load.add_argument("--folder", default=None, metavar="DIR", help="where the checkpoint is made (default: temporary)")
    lora = commands.add_parser(
        "lora",
        help="LoRA on one layer's experts, forward and backward, against PEFT's target_parameters",
        epilog="example: python -m benchmarks lora --rounds 20",
    )
    lora.add_argument("--tokens", type=int, metavar="T", help="default: 1024, on a GPU 8192")
    lora.add_argument("--hidden-size", type=int, metavar="H", help="default: 512, on a GPU 4096")
    lora.add_argument("--intermediate-size", type=int, metavar="I", help="default: 800, on a GPU 6400")
    lora.add_argument("--experts", type=int, default=16, metavar="E")
    lora.add_argument("--r", type=int, default=16, metavar="R", help="rank (default: 16)")
    lora.add_argument("--warmup", type=int, default=3, metavar="N", help="uncounted rounds (default: 3)")
    lora.add_argument("--rounds", type=int, default=10, metavar="N", help="counted rounds (default: 10)")
    _add_limits(lora)
    for name, what in (
        ("router", "the router, against its torch operators"),
        ("layer", "a layer, sparse against dense"),
    ):
        other = commands.add_parser(name, help=what, epilog=f"example: python -m benchmarks {name} --rounds 20")
        other.add_argument("--tokens", type=int, metavar="T", help="default: as the device has room for")
        other.add_argument("--warmup", type=int, default=5, metavar="N", help="uncounted rounds (default: 5)")
        other.add_argument("--rounds", type=int, default=20, metavar="N", help="counted rounds (default: 20)")
        _add_limits(other)
    correctness = commands.add_parser(
        "correctness",
        help="every Triton kernel against the reference, on the GPU",
        epilog="example: python -m benchmarks correctness",
    )
    _add_limits(correctness)
    experts = commands.add_parser(
        "experts",
        help="one layer's experts for 1 to 128 tokens, as in decoding",
        epilog="example: python -m benchmarks experts --tokens 10 64",
    )
    sizes = (1, 8, 10, 16, 32, 64, 128)
    experts.add_argument("--tokens", type=int, nargs="+", default=sizes, metavar="T", help="default: 1 to 128")
    experts.add_argument("--warmup", type=int, default=5, metavar="N", help="uncounted rounds (default: 5)")
    experts.add_argument("--rounds", type=int, default=30, metavar="N", help="counted rounds (default: 30)")
    _add_limits(experts)
    soak = commands.add_parser(
        "soak",
        help="grinmoe serve under streams and hostile clients at once: what is left behind",
        epilog="example: python -m benchmarks soak --minutes 10",
    )
    soak.add_argument("--minutes", type=float, default=10.0, metavar="M", help="of load (default: 10)")
    soak.add_argument("--streams", type=int, default=32, metavar="N", help="clients at a time (default: 32)")
    soak.add_argument("--one-at-a-time", action="store_true", help="without continuous batching")
    _add_models(commands)
    _add_suites(commands)
    return parser


def _add_models(commands: Any) -> None:
    decode = commands.add_parser(
        "decode",
        help="tokens per second of generate, against Transformers' phimoe with the same weights",
        epilog="example: python -m benchmarks decode --batches 1 8",
    )
    decode.add_argument("--layers", type=int, metavar="L", help="default: 4, on a GPU 32 or what fits")
    decode.add_argument("--batches", type=int, nargs="+", default=(1, 8, 32), metavar="B", help="default: 1 8 32")
    decode.add_argument("--new-tokens", type=int, default=128, metavar="N", help="of every row (default: 128)")
    _add_limits(decode)
    train_step = commands.add_parser(
        "train_step",
        help="whole steps through the Trainer, a sparse model against its dense twin",
        epilog="example: python -m benchmarks train_step --layers 2",
    )
    train_step.add_argument("--layers", type=int, default=2, metavar="L", help="default: 2")
    train_step.add_argument("--batch", type=int, default=4, metavar="B", help="rows of a step (default: 4)")
    train_step.add_argument("--sequence", type=int, metavar="S", help="tokens of a row; default: 256, on a GPU 4096")
    _add_limits(train_step)
    fsdp = commands.add_parser(
        "fsdp",
        help="training steps under FSDP2 on one rank, against the same without it",
        epilog="example: python -m benchmarks fsdp --layers 2",
    )
    fsdp.add_argument("--layers", type=int, default=2, metavar="L", help="default: 2")
    fsdp.add_argument("--batch", type=int, default=4, metavar="B", help="rows of a step (default: 4)")
    fsdp.add_argument("--sequence", type=int, default=4096, metavar="S", help="default: 4096, on a CPU at most 256")
    _add_limits(fsdp)


def _add_suites(commands: Any) -> None:
    for device, example in (("gpu", "gpu --part 1 --archive results.tar.gz"), ("cpu", "cpu")):
        suite = commands.add_parser(
            device,
            help=f"all of a {device.upper()}'s benchmarks, and the goals in one table",
            epilog=f"example: python -m benchmarks {example}",
        )
        suite.add_argument("--minutes", type=float, metavar="M", help="all together (default: what they need)")
        suite.add_argument("--only", nargs="+", default=(), metavar="NAME", help="these benchmarks (default: all)")
        suite.add_argument(
            "--archive", metavar="PATH", help="pack this run's results into PATH, a .tar.gz, as they come"
        )
        if device == "gpu":
            suite.add_argument("--part", type=int, metavar="N", help="1, 2 or 3: under ten minutes each (default: all)")
            suite.add_argument("--toy", action="store_true", help="try the code on a CPU, tiny, kernels interpreted")


def _add_limits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, metavar="M", help="measure fewer rounds after so many")
    parser.add_argument("--toy", action="store_true", help="a GPU's arms on a CPU, tiny: needs TRITON_INTERPRET=1")


def main() -> None:
    options = vars(build_parser().parse_args())
    # Imported after parsing: --help should not wait for torch.
    command = options.pop("command")
    try:
        path = run(command, options)
    except (RuntimeError, ValueError) as error:
        raise SystemExit(f"benchmarks {command}: {error}") from error
    print(f"\nwritten to {path}")


def run(command: str, options: dict[str, Any]) -> Path:
    if command in ("gpu", "cpu"):
        from benchmarks import suite

        options["only"] = tuple(options["only"])
        return suite.run(suite.SuiteSettings(device=command, **options))
    if command == "block":
        from benchmarks import bench_block

        return bench_block.run(bench_block.BlockSettings(**options))
    if command == "correctness":
        from benchmarks import bench_correctness

        return bench_correctness.run(bench_correctness.CorrectnessSettings(**options))
    if command == "experts":
        from benchmarks import bench_experts

        options["tokens"] = tuple(options["tokens"])
        return bench_experts.run(bench_experts.ExpertsSettings(**options))
    if command == "fsdp":
        from benchmarks import bench_fsdp

        return bench_fsdp.run(bench_fsdp.FsdpSettings(**options))
    if command == "router":
        from benchmarks import bench_router

        return bench_router.run(bench_router.RouterSettings(**options))
    if command == "layer":
        from benchmarks import bench_layer

        return bench_layer.run(bench_layer.LayerSettings(**options))
    if command == "decode":
        from benchmarks import bench_decode

        options["batches"] = tuple(options["batches"])
        return bench_decode.run(bench_decode.DecodeSettings(**options))
    if command == "train_step":
        from benchmarks import bench_train_step

        return bench_train_step.run(bench_train_step.TrainStepSettings(**options))
    if command == "lora":
        from benchmarks import bench_lora

        return bench_lora.run(bench_lora.LoraSettings(**options))
    if command == "soak":
        from benchmarks import bench_soak

        return bench_soak.run(bench_soak.SoakSettings(**options))
    from benchmarks import bench_load

    return bench_load.run(bench_load.LoadSettings(**options))


if __name__ == "__main__":
    main()
