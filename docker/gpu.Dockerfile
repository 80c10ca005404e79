# opd on NVIDIA GPUs, with vLLM and DeepSpeed. Build from the root of the repository: docker build -f docker/gpu.Dockerfile -t opd:gpu .
# The devel image: DeepSpeed's fused optimisers are compiled with nvcc on first use.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV DEBIAN_FRONTEND=noninteractive
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git ninja-build python3.12 python3.12-dev python3.12-venv tini \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1001 opd
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH
RUN python3.12 -m venv "$VIRTUAL_ENV"
WORKDIR /opt/opd
COPY pyproject.toml README.md ./
COPY docker/constraints-gpu.txt docker/constraints-gpu.txt
COPY opd opd
COPY rollout rollout
COPY kernels kernels
COPY recipes recipes
COPY models models
RUN python -m pip install --no-cache-dir -c docker/constraints-gpu.txt ".[gpu]"

USER 1001
WORKDIR /work
# hadolint ignore=DL3064
ENV TOKENIZERS_PARALLELISM=false
ENTRYPOINT ["tini", "-g", "--", "opd"]
CMD ["show"]
