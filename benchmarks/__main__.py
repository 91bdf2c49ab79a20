"""`python -m benchmarks NAME`: run one benchmark and write its result under benchmarks/results/."""

from __future__ import annotations

import argparse


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
    block.add_argument("--minutes", type=float, metavar="M", help="measure fewer rounds after so many")
    block.add_argument("--toy", action="store_true", help="a GPU's arms on a CPU, tiny: needs TRITON_INTERPRET=1")
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
    for name, what in (
        ("router", "the router, against its torch operators"),
        ("layer", "a layer, sparse against dense"),
    ):
        other = commands.add_parser(name, help=what, epilog=f"example: python -m benchmarks {name} --rounds 20")
        other.add_argument("--tokens", type=int, metavar="T", help="default: as the device has room for")
        other.add_argument("--warmup", type=int, default=5, metavar="N", help="uncounted rounds (default: 5)")
        other.add_argument("--rounds", type=int, default=20, metavar="N", help="counted rounds (default: 20)")
        other.add_argument("--minutes", type=float, metavar="M", help="measure fewer rounds after so many")
        other.add_argument("--toy", action="store_true", help="a GPU's arms on a CPU, tiny: needs TRITON_INTERPRET=1")
    gpu = commands.add_parser(
        "gpu",
        help="all of a GPU's benchmarks, and the goals in one table",
        epilog="example: python -m benchmarks gpu --toy",
    )
    gpu.add_argument("--minutes", type=float, default=9.0, metavar="M", help="all together (default: 9)")
    gpu.add_argument("--toy", action="store_true", help="try the code on a CPU, tiny, kernels interpreted")
    return parser


def main() -> None:
    options = vars(build_parser().parse_args())
    # Imported after parsing: --help should not wait for torch.
    command = options.pop("command")
    if command == "block":
        from benchmarks.bench_block import BlockSettings, run

        path = run(BlockSettings(**options))
    elif command == "router":
        from benchmarks.bench_router import RouterSettings, run

        path = run(RouterSettings(**options))
    elif command == "layer":
        from benchmarks.bench_layer import LayerSettings, run

        path = run(LayerSettings(**options))
    elif command == "gpu":
        from benchmarks.suite import SuiteSettings, run

        path = run(SuiteSettings(**options))
    elif command == "lora":
        from benchmarks.bench_lora import LoraSettings, run

        path = run(LoraSettings(**options))
    else:
        from benchmarks.bench_load import LoadSettings, run

        path = run(LoadSettings(**options))
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
