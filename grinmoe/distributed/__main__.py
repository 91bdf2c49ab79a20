"""Check a launch, or export a sharded checkpoint: `python -m grinmoe.distributed check | export`."""

from __future__ import annotations

import argparse

import torch

from .manifest import check_manifest, has_manifest
from .sharded_checkpoint import export_sharded
from .sharding import check_launch


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m grinmoe.distributed")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="check that this machine has the GPUs that a launch needs")
    check.add_argument("launch", metavar="FILE", help="configuration for accelerate launch (recipes/accelerate/)")
    export = commands.add_parser("export", help="write a sharded checkpoint as a full one, or as a PEFT adapter")
    export.add_argument("--checkpoint", required=True, metavar="DIR", help="the Trainer's folder: run/checkpoint-200")
    export.add_argument("--output", required=True, metavar="DIR", help="folder of the model or adapter")
    export.add_argument("--config", metavar="DIR_OR_HUB_ID", help="of the weights (default: the checkpoint's own)")
    export.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    options = parser.parse_args(arguments)
    try:
        if options.command == "check":
            check_launch(options.launch)
        else:
            if has_manifest(options.checkpoint):
                check_manifest(options.checkpoint)
            export_sharded(options.checkpoint, options.output, options.config, getattr(torch, options.dtype))
    except (OSError, ValueError) as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
