"""A training for test_fsdp2.py to launch, kill and launch again:

torchrun --standalone --nproc-per-node 2 -m tests.distributed.launched_job START FOLDER --batch 2 --kill-at 3
"""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from grinmoe.distributed.sharded_checkpoint import is_whole
from tests.distributed.fsdp_on_cpu import fsdp_on_cpu, greedy_routing
from tests.distributed.sharded_jobs import train_and_save


class KillLastRank(TrainerCallback):
    """As when the machine takes a process away: no exception, no clean-up."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step and dist.get_rank() == dist.get_world_size() - 1:
            Path(args.output_dir, "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("start", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--kill-at", type=int, default=-1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    checkpoints = [folder for folder in options.folder.glob("checkpoint-*") if is_whole(folder)]
    last = max(checkpoints, key=lambda folder: int(folder.name.removeprefix("checkpoint-")), default=None)
    dist.barrier()
    with greedy_routing(), fsdp_on_cpu():
        train_and_save(options.start, options.folder, options.batch, last, [KillLastRank(options.kill_at)])


if __name__ == "__main__":
    main()
