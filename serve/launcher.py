"""Starts the server: verifies the adapters, sets what vLLM must be told, and hands over to it."""

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from credence.adapters import Artifact, ArtifactError, is_merged, load_artifact, load_merged
from credence.serve.config import ADAPTER_NAME, CONFIG_VARIABLE, TOKEN_VARIABLE, ServeConfig
from credence.serve.errors import ConfigurationError
from credence.serve.telemetry import json_logging

SHARED_MEMORY = Path("/dev/shm")


def main(
    base: str,
    adapters: Mapping[str, str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key_file: str | None = None,
    extra_args: Sequence[str] = (),
    default_samples: int = 8,
    max_samples: int = 32,
    sample_slots: int | None = None,
    log_format: str = "text",
) -> int:
    """Serves ``base`` with Bayesian adapters until a signal.

    Args:
        base: model folder or hub id; a folder of `credence merge` brings its adapter with it.
        adapters: artifact folder by served name; empty for a merged model.
        api_key_file: file holding the API key that requests must send.
        extra_args: any flags of vLLM's server.
        default_samples, max_samples: K when a request does not say, and the largest K.
        sample_slots: samples that the workers keep; at least ``max_samples``.
        log_format: ``text`` or ``json``.

    Returns:
        The process's exit code.

    Raises:
        ConfigurationError: the server cannot start like this; nothing was started.
    """
    state = Path(tempfile.mkdtemp(prefix="credence-serve-"))
    stats = Path(tempfile.mkdtemp(prefix="credence-", dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else state))
    try:
        merged = is_merged(base)
        dtype: str | None = None
        if merged:
            stored, rank, modules, dtype = verify_merged(base, adapters, state / "artifacts", extra_args)
        else:
            stored, rank, modules = verify(adapters, state / "artifacts")
        config = ServeConfig(
            adapters=stored,
            merged=merged,
            default_samples=min(default_samples, max_samples),
            max_samples=max_samples,
            sample_slots=sample_slots,
            state_dir=str(state),
            stats_dir=str(stats),
        )
        set_environment(config, api_keys(api_key_file))
        if log_format == "json":
            log_json(state / "logging.json")
        # Imported here: importing vLLM reads the environment.
        from credence.serve.vllm_plugin import server

        argv = ["--model", base, "--host", host, "--port", str(port)]
        argv += defaults(
            config,
            rank=server.smallest_lora_rank(rank),
            modules=modules,
            scheduler=server.SCHEDULER,
            given=extra_args,
            dtype=dtype,
        )
        return server.run([*argv, *extra_args])
    finally:
        shutil.rmtree(stats, ignore_errors=True)
        shutil.rmtree(state, ignore_errors=True)


def verify(adapters: Mapping[str, str], store: Path) -> tuple[dict[str, str], int, list[str]]:
    """Verifies every artifact and copies it to the server's private store.

    Returns:
        Folder of the copy by name, the largest rank, and the union of the adapted modules' last names.

    Raises:
        ConfigurationError: a name is not valid or an artifact is refused; the message holds the reason.
    """
    stored: dict[str, str] = {}
    rank = 1
    modules: set[str] = set()
    if not adapters:
        raise ConfigurationError("no adapter given; pass --adapter NAME=DIR at least once")
    for name, path in adapters.items():
        if not ADAPTER_NAME.match(name):
            raise ConfigurationError(f"--adapter: the name {name!r} must match {ADAPTER_NAME.pattern}")
        try:
            artifact = load_artifact(path, store=store)
        except ArtifactError as error:
            raise ConfigurationError(f"--adapter {name}={path} is refused ({error.reason}): {error}") from error
        if artifact.head:
            raise ConfigurationError(
                f"--adapter {name}={path} is a classifier on an encoder, with a head of its own; vLLM serves causal language models: "
                "evaluate it with `credence eval`"
            )
        stored[name] = str(artifact.path)
        rank = max(rank, artifact.config.rank)
        modules |= _adapted(artifact)
    return stored, rank, sorted(modules)


def verify_merged(
    base: str, adapters: Mapping[str, str], store: Path, given: Sequence[str]
) -> tuple[dict[str, str], int, list[str], str]:
    """Verifies a merged model, its weights too, and copies its artifact to the server's private store.

    Args:
        base: folder that `credence merge` wrote.
        given: the user's flags for vLLM; `--served-model-name` among them renames the adapter.

    Returns:
        Folder of the copy by served name, the rank of the delta adapters, the adapted modules' last names, and the weights' dtype.

    Raises:
        ConfigurationError: other adapters were given, the name is not valid, or the folder is refused; the message holds the reason.
    """
    if adapters:
        raise ConfigurationError(
            f"{base} is a merged model and serves its own adapter alone; remove --adapter {', '.join(sorted(adapters))}, or serve the "
            "base model with several adapters"
        )
    names = flag_values("--served-model-name", given)
    if names is not None and (len(names) != 1 or not ADAPTER_NAME.match(names[0])):
        raise ConfigurationError(
            f"--served-model-name {' '.join(names)}: a merged model has one name, and it must match {ADAPTER_NAME.pattern}"
        )
    try:
        model = load_merged(base, store=store)
    except ArtifactError as error:
        raise ConfigurationError(f"the merged model {base} is refused ({error.reason}): {error}") from error
    stored = {names[0] if names else model.name: str(model.artifact.path)}
    return stored, model.rank, sorted(_adapted(model.artifact)), model.dtype


def _adapted(artifact: Artifact) -> set[str]:
    """Last names of the modules an artifact changes; raises ConfigurationError for one that vLLM serves wrongly."""
    modules = {module.rpartition(".")[2] for module in artifact.mean}
    if "lm_head" in modules:
        raise ConfigurationError(
            "an adapter changes lm_head; vLLM 0.32 computes wrong log-probabilities there, train without it"
        )
    return modules


def flag_values(flag: str, given: Sequence[str]) -> list[str] | None:
    """The values of the last ``flag`` in a command line (``--a-b x y``, ``--a_b=x``), or None without it."""
    found: list[str] | None = None
    open_flag = False
    for part in given:
        name, equals, value = part.partition("=")
        if part.startswith("--"):
            open_flag = name.replace("_", "-") == flag
            if open_flag:
                found = [value] if equals else []
        elif part.startswith("-") and len(part) > 1:
            open_flag = False
        elif open_flag and found is not None:
            found.append(part)
    return found


def set_environment(config: ServeConfig, keys: Sequence[str]) -> None:
    """Leaves the configuration where the plugins and vLLM's child processes find it."""
    os.environ[CONFIG_VARIABLE] = config.model_dump_json()
    os.environ[TOKEN_VARIABLE] = secrets.token_hex(16)
    named = [name for name in os.environ.get("VLLM_PLUGINS", "").split(",") if name]
    os.environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*named, "credence", "credence_http"]))
    # vLLM's own choice would be the second runner on GPUs; there ensembles are experimental, so it has to be asked for.
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") or "0"
    if len(keys) == 1:
        os.environ["VLLM_API_KEY"] = keys[0]


def log_json(path: Path) -> None:
    """Lets vLLM, in all its processes, and uvicorn log as JSON lines; a configuration file that the user has given goes first."""
    path.write_text(json.dumps(json_logging(os.environ.get("VLLM_LOGGING_LEVEL", "INFO"))))
    os.environ.setdefault("VLLM_LOGGING_CONFIG_PATH", str(path))


def defaults(
    config: ServeConfig,
    *,
    rank: int,
    modules: Sequence[str],
    scheduler: str,
    given: Sequence[str],
    dtype: str | None = None,
) -> list[str]:
    """vLLM's flags that ensembles need. Flags the user gave are left to the user; the plugin refuses what does not fit.

    Args:
        dtype: of a merged model's weights. vLLM would round a float32 model to a half precision by itself.
    """
    wanted: dict[str, list[str]] = {
        "--enable-lora": [],
        "--max-loras": [str(config.max_samples + config.num_mean_loras)],
        "--max-cpu-loras": [str(config.num_slots + config.num_mean_loras)],
        "--max-lora-rank": [str(rank)],
        "--lora-target-modules": list(modules),
        "--scheduler-cls": [scheduler],
        "--shutdown-timeout": ["30"],
        # credence.serve.telemetry writes the access log.
        "--disable-uvicorn-access-log": [],
        # vLLM bounds n and the number of prompts, not their product: one request can hold 16 million sequences.
        "--max-num-queued-reqs": [str(2 * config.max_inflight_rows)],
    }
    if config.merged:
        wanted["--served-model-name"] = list(config.adapters)
    if dtype is not None:
        wanted["--dtype"] = [dtype]
    names = {flag.partition("=")[0].replace("_", "-") for flag in given if flag.startswith("--")}
    return [part for flag, values in wanted.items() if flag not in names for part in (flag, *values)]


def api_keys(path: str | None) -> list[str]:
    """Reads the API key file.

    Raises:
        ConfigurationError: the file cannot be read or holds no key.
    """
    if path is None:
        return []
    try:
        keys = [line.strip() for line in Path(path).read_text().splitlines() if line.strip()]
    except OSError as error:
        raise ConfigurationError(f"--api-key-file {path} cannot be read: {error.strerror}") from error
    if len(keys) != 1:
        raise ConfigurationError(f"--api-key-file {path} must hold one key on one line, it holds {len(keys)}")
    return keys
