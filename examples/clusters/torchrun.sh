#!/usr/bin/env bash
# torchrun; start it on every machine with the same arguments, except for NODE_RANK. Further arguments go to the training.
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node-1 examples/clusters/torchrun.sh --output_dir /shared/outputs/best
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=node-1 examples/clusters/torchrun.sh --output_dir /shared/outputs/best
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

: "${NNODES:?number of machines}" "${NODE_RANK:?0 on the first machine, 1 on the next}" "${MASTER_ADDR:?the first one}"
if [[ -n "${NIC:-}" ]]; then  # the network between the machines, if the system would choose another one
  export GLOO_SOCKET_IFNAME="$NIC" NCCL_SOCKET_IFNAME="$NIC"
fi
# As --signals-to-handle, which the torchrun of PyTorch 2.8 does not know: it goes on without it.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
# exec: a signal to this script reaches torchrun, which passes it on to the ranks.
exec torchrun --nnodes "$NNODES" --node_rank "$NODE_RANK" --nproc_per_node "${GPUS_PER_NODE:-8}" \
  --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}" \
  src/train_vlm_sft.py --sft_config "${SFT_CONFIG:-configs/sft_config_best.json}" --resume auto "$@"
