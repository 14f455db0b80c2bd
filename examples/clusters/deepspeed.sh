#!/usr/bin/env bash
# DeepSpeed on the machines of a host file; start it on the first machine. Further arguments go to the training.
#   examples/clusters/deepspeed.sh --output_dir /shared/outputs/best
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
cd "$here/../.."

HOSTFILE="${HOSTFILE:-$here/hostfile}"
deepspeed --hostfile "$HOSTFILE" --master_port "${MASTER_PORT:-29500}" src/train_vlm_sft.py \
  --sft_config "${SFT_CONFIG:-configs/sft_config_best.json}" --flash_attn --resume auto "$@"
