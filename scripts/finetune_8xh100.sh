#!/usr/bin/env bash
# Fine-tune GRIN-MoE on one machine with 8 H100, with FSDP2 through Accelerate.
#
#   scripts/finetune_8xh100.sh [--dry-run] full|lora|offload sft|dpo|pretrain RECIPE [--key value ...]
#
#   scripts/finetune_8xh100.sh lora sft recipes/sft_lora.yaml --train_data chats.jsonl --output_dir runs/sft
#
# The first word chooses recipes/accelerate/fsdp2_8xh100_*.yaml; RECIPE and what follows are those of `grinmoe sft` and so
# on. --dry-run prints the command and starts nothing. docs/sharding.md says which file is for what.
set -euo pipefail
cd "$(dirname "$0")/.."

dry_run=false
if [[ "${1:-}" == "--dry-run" ]]; then
    dry_run=true
    shift
fi
if [[ $# -lt 3 ]]; then
    echo "error: usage: $0 [--dry-run] full|lora|offload sft|dpo|pretrain RECIPE [--key value ...]" >&2
    exit 1
fi
launch="recipes/accelerate/fsdp2_8xh100_$1.yaml" task="$2" recipe="$3"
shift 3
if [[ ! -f "$launch" ]]; then
    echo "error: there is no $launch; choose full, lora or offload" >&2
    exit 1
fi
if [[ ! "$task" =~ ^(sft|dpo|pretrain)$ ]]; then
    echo "error: there is no task $task; choose sft, dpo or pretrain" >&2
    exit 1
fi
if [[ ! -f "$recipe" ]]; then
    echo "error: there is no recipe $recipe; choose one of:" recipes/*.yaml >&2
    exit 1
fi

command=(accelerate launch --config_file "$launch" -m grinmoe_cli "$task" --config "$recipe" "$@")
if $dry_run; then
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi
# Before eight processes start and each fails in its own way.
python -m grinmoe.distributed check "$launch"
exec "${command[@]}"
