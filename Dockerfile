# GPU image: vLLM's own server image with Credence's plugins in it.
#   docker build -t credence .
#   docker run --gpus all --shm-size 1g -p 8000:8000 -v $PWD/out:/adapters:ro credence \
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
    && useradd --create-home --uid 10001 credence

USER credence
WORKDIR /home/credence
EXPOSE 8000
# Loading a large model takes minutes; /livez answers once the server listens.
HEALTHCHECK --start-period=15m --interval=15s --timeout=5s --retries=3 \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/livez', timeout=4)"]
# The arguments of `docker run` follow: BASE --adapter NAME=DIR [any vLLM flag]. 0.0.0.0 is the container's own network.
ENTRYPOINT ["credence", "serve", "--host", "0.0.0.0", "--port", "8000"]
