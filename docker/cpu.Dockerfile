# opd on a CPU: everything but vLLM and CUDA. Build from the root of the repository: docker build -f docker/cpu.Dockerfile -t opd:cpu .
FROM python:3.11.14-slim-bookworm

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# gcc and ninja: DeepSpeed compiles its CPU operators on first use. tini: Ctrl-C and SIGTERM reach opd, and no child is left behind.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ ninja-build tini \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 opd
WORKDIR /opt/opd
COPY pyproject.toml constraints-cpu.txt README.md ./
COPY opd opd
COPY rollout rollout
COPY kernels kernels
COPY recipes recipes
COPY models models
RUN python -m pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu torch==2.13.0 \
    && python -m pip install --no-cache-dir -c constraints-cpu.txt ".[train]"

USER 1000
WORKDIR /work
# hadolint ignore=DL3064
ENV DS_ACCELERATOR=cpu TOKENIZERS_PARALLELISM=false
ENTRYPOINT ["tini", "-g", "--", "opd"]
CMD ["show"]
