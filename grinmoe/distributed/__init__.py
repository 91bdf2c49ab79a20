"""FSDP2 sharding for a Trainer, and checkpoints of sharded models."""

from .manifest import (
    MANIFEST_NAME,
    DamagedCheckpointError,
    added_files,
    check_manifest,
    has_manifest,
    read_manifest,
    size_in_bytes,
    write_manifest,
)
from .sharded_checkpoint import export_sharded, is_sharded, is_whole
from .sharding import check_gpus, load_for_sharding, shard_for, shard_model
