# GPU image: vLLM's own server image with Credence's plugins in it.
#   docker build -t credence .
#   docker run --gpus all --read-only --tmpfs /tmp:exec,mode=1777 --shm-size 1g --cap-drop ALL --security-opt no-new-privileges \
#     -p 8000:8000 -v $PWD/out:/adapters:ro credence \
#     meta-llama/Llama-3.2-1B --adapter triage=/adapters/triage
# Never built where it was written (no Docker and no registry there): the build checks its own imports below.
FROM vllm/vllm-openai:v0.32.0

WORKDIR /opt/credence
COPY pyproject.toml README.md LICENSE ./
COPY adapters adapters
COPY benchmarks benchmarks
COPY cli cli
COPY clients clients
COPY demo demo
COPY serve serve
COPY training training
# Without dependencies: the image brings what serving needs, in the versions vLLM was built with.
RUN python3 -m pip install --no-cache-dir --no-deps . \
    && python3 -c "import importlib.metadata as m; assert m.version('vllm').startswith('0.32.'), m.version('vllm')" \
    && python3 -c "import credence.cli.main, credence.clients, credence.serve.launcher, prometheus_client, yaml" \
    && useradd --no-create-home --home-dir /tmp/home --uid 10001 credence

ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Credence" \
      org.opencontainers.image.description="Serves Bayesian LoRA adapters with their uncertainty, on vLLM" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

# One writable place: with a read-only root file system, a tmpfs on /tmp (compiled kernels, verified copies of the artifacts; executable,
# because kernels are loaded from it) and /dev/shm (vLLM's queues, statistics of running ensembles). HF_HOME wants a volume if models are
# downloaded.
ENV HOME=/tmp/home TMPDIR=/tmp XDG_CACHE_HOME=/tmp/cache XDG_CONFIG_HOME=/tmp/config HF_HOME=/tmp/huggingface \
    TRITON_CACHE_DIR=/tmp/cache/triton TORCHINDUCTOR_CACHE_DIR=/tmp/cache/inductor NUMBA_CACHE_DIR=/tmp/cache/numba \
    PYTHONDONTWRITEBYTECODE=1 VLLM_NO_USAGE_STATS=1 \
    CREDENCE_HOST=0.0.0.0 CREDENCE_PORT=8000

USER 10001:10001
WORKDIR /tmp
EXPOSE 8000
# /livez and not /readyz: orchestrators replace an unhealthy container, and one that drains or is full must not be replaced. The server
# listens only once the engine is up, which takes minutes for a large model.
HEALTHCHECK --start-period=15m --interval=15s --timeout=5s --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ[\"CREDENCE_PORT\"]}/livez', timeout=4)"]
# The arguments of `docker run` follow: BASE --adapter NAME=DIR [any vLLM flag], or nothing with CREDENCE_CONFIG or CREDENCE_BASE set.
ENTRYPOINT ["credence", "serve"]
