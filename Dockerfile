# vlm-sft in a container, on CPUs or on NVIDIA GPUs (with the NVIDIA Container Toolkit):
#   docker build -t vlm-sft .
#   docker run --rm -v "$PWD/outputs:/work/outputs" vlm-sft train --base_model pocket --dataset demo_charts --output_dir outputs/first
#   docker run --rm --gpus all --shm-size 16g -v … vlm-sft train --sft_config best --output_dir outputs/best --flash_attn
#   docker run --rm --gpus all --shm-size 16g -v … --entrypoint deepspeed vlm-sft --num_gpus=8 --module vlm_sft train …
# A smaller image without CUDA: docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu -t vlm-sft:cpu .
FROM python:3.12-slim
ARG TORCH_INDEX=
ARG EXTRAS=deepspeed,easy-vqa,liger,qlora
# Triton, which PyTorch's kernels on GPUs need, compiles with gcc.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY scripts/constraints.txt scripts/constraints.txt
# PyTorch by itself: a change of this package leaves its layer as it is.
RUN pip install --no-cache-dir --constraint scripts/constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
COPY pyproject.toml README.md LICENSE MANIFEST.in ./
COPY src src
RUN DS_BUILD_OPS=0 pip install --no-cache-dir --constraint scripts/constraints.txt ".[$EXTRAS]"
WORKDIR /work
ENTRYPOINT ["vlm-sft"]
