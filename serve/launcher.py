"""Starts the server: verifies the adapters, sets what vLLM must be told, and hands over to it."""

import json
import os
import secrets
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

from credence.adapters import ArtifactError, KeyFileError, TrustRoot, is_merged, load_artifact, load_merged
from credence.serve import adapter_folder
from credence.serve.adapter_registry import adapted_modules
from credence.serve.config import ADAPTER_NAME, CONFIG_VARIABLE, TOKEN_VARIABLE, ServeConfig
from credence.serve.errors import ArtifactRefused, ConfigurationError
from credence.serve.keys import KeyRing
from credence.serve.limits import RequestLimits
from credence.serve.preflight import Checks, Memory, Row, check_memory, check_modules, check_port, read_base
from credence.serve.routes import with_extra
from credence.serve.telemetry import json_logging

REFUSED = 2
"""Exit code of ``--check`` where the server would not start."""
SHARED_MEMORY = Path("/dev/shm")
NO_ADAPTER = (
    "no adapter given; pass --adapter NAME=DIR at least once, or an --adapter-dir with a good one: the first adapters say which rank and "
    "modules the server has room for"
)
ADAPTERS_AT_RUN_TIME = 8
"""Room for adapters on a server that takes more while it runs."""


def main(
    base: str,
    adapters: Mapping[str, str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key_file: str | None = None,
    admin_key_file: str | None = None,
    extra_routes: Sequence[str] = (),
    return_samples: bool = True,
    max_sequences: int | None = None,
    audit_log: str | None = None,
    extra_args: Sequence[str] = (),
    default_samples: int = 8,
    max_samples: int = 32,
    sample_slots: int | None = None,
    max_adapters: int | None = None,
    adapter_roots: Sequence[str] = (),
    adapter_dir: str | None = None,
    trust: str | None = None,
    max_inflight_rows: int = 1024,
    readiness_timeout_s: float = 5.0,
    log_format: str = "text",
    checks: Checks | None = None,
) -> int:
    """Serves ``base`` with Bayesian adapters until a signal.

    Args:
        base: model folder or hub id; a folder of `credence merge` brings its adapter with it.
        adapters: artifact folder by served name; empty for a merged model.
        api_key_file, admin_key_file: files with the keys of users, and of /admin (see credence.serve.keys).
        extra_routes: further routes of vLLM's that users may call.
        return_samples: whether ``uncertainty.return_samples`` is permitted at all.
        max_sequences: largest n x (1 + K) x prompts of a request; None for the default.
        audit_log: file of the audit log.
        extra_args: any flags of vLLM's server.
        default_samples, max_samples: K when a request does not say, and the largest K.
        sample_slots: samples that the workers keep; at least ``max_samples``.
        max_adapters: adapters that may be served at once; None for those given, or :data:`ADAPTERS_AT_RUN_TIME` if more can come later.
        adapter_roots: folders below which artifacts may be loaded at run time.
        adapter_dir: folder whose sub-folders are adapters by name, watched while the server runs.
        trust: file of public keys; an artifact, or a merged model, must be signed by one of them.
        max_inflight_rows: samples x sequences that are answered at once.
        readiness_timeout_s: how long /readyz waits for its own request.
        checks: notes what the checks find; those that keep going make all of them, and no server is started.
        log_format: ``text`` or ``json``.

    Returns:
        The process's exit code; with checks that keep going 0, or 2 if one found a problem.

    Raises:
        ConfigurationError: the server cannot start like this; nothing was started.
    """
    checks = checks or Checks()
    state = Path(tempfile.mkdtemp(prefix="credence-serve-"))
    stats = Path(tempfile.mkdtemp(prefix="credence-", dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else state))
    try:
        trusted = trust_root(trust)
        merged = is_merged(base)
        dtype: str | None = None
        found: dict[str, str] = {}
        stored: dict[str, str] = {}
        rank, modules = 1, set[str]()
        if merged:
            with checks.step("merged model") as row:
                stored, rank, names, dtype = verify_merged(base, adapters, state / "artifacts", extra_args, trusted)
                modules, row.found = set(names), f"{next(iter(stored))}, rank {rank}, {dtype}"
        else:
            found = {} if adapter_dir is None else adapters_of(adapter_dir, trusted)
            if not adapters and not found:
                raise ConfigurationError(NO_ADAPTER)
        for name, path in {**found, **adapters}.items() if not merged else ():
            with checks.step(f"adapter {name}") as row:
                copies, its_rank, names = verify({name: path}, state / "artifacts", trusted)
                stored, rank, modules = stored | copies, max(rank, its_rank), modules | set(names)
                row.found = f"verified, rank {its_rank}, {len(names)} kinds of layers"
        for what, file, admin in (("API keys", api_key_file, False), ("admin keys", admin_key_file, True)):
            with checks.step(what) as row:
                ring = KeyRing(None if file is None else Path(file), admin=admin)
                row.found = (
                    f"{file}" if ring.guards else "none: /admin is closed" if admin else "none: everybody may ask"
                )
        with checks.step("routes") as row:
            row.found = f"{len(with_extra(extra_routes))}"
        if checks.keep_going:
            with checks.step("address") as row:
                row.found = check_port(host, port)
        if not stored:  # only with keep_going: nothing is left to be served
            return REFUSED
        config = ServeConfig(
            adapters=stored,
            merged=merged,
            default_samples=min(default_samples, max_samples),
            max_samples=max_samples,
            sample_slots=sample_slots,
            max_adapters=max_adapters
            or room_for_adapters(len(stored), bool(adapter_roots or adapter_dir) and not merged),
            adapter_roots=tuple(adapter_roots),
            adapter_dir=adapter_dir,
            adapters_of_dir=tuple(sorted(found.keys() - adapters.keys())),
            limits=RequestLimits() if max_sequences is None else RequestLimits(max_sequences=max_sequences),
            api_key_file=api_key_file and os.path.abspath(api_key_file),
            admin_key_file=admin_key_file and os.path.abspath(admin_key_file),
            extra_routes=tuple(extra_routes),
            return_samples=return_samples,
            audit_log=audit_log and os.path.abspath(audit_log),
            trust=None if trust is None else str(Path(trust).resolve()),
            max_inflight_rows=max_inflight_rows,
            readiness_timeout_s=readiness_timeout_s,
            state_dir=str(state),
            stats_dir=str(stats),
        )
        set_environment(config)
        if log_format == "json":
            log_json(state / "logging.json")
        # Imported here: importing vLLM reads the environment.
        from credence.serve.vllm_plugin import server

        argv: list[str] = []
        with checks.step("rank") as row:
            allowed = server.smallest_lora_rank(rank)
            row.found = f"largest {rank}, --max-lora-rank {allowed}"
            argv = ["--model", base, "--host", host, "--port", str(port)]
            argv += defaults(
                config,
                rank=allowed,
                modules=sorted(modules),
                scheduler=server.SCHEDULER,
                given=extra_args,
                dtype=dtype,
            )
            argv += extra_args
        args: Namespace | None = None
        with checks.step("vLLM's flags") as row:
            args = server.parse(argv)
            row.found = f"K up to {max_samples}: --max-num-seqs {args.max_num_seqs or 'automatic'}, --max-loras {args.max_loras}"
        if args is not None:
            check_model(checks, config, args, sorted(modules), server.memory(args))
        if checks.keep_going:
            return REFUSED if checks.refused else 0
        assert args is not None
        return server.run(args)
    finally:
        shutil.rmtree(stats, ignore_errors=True)
        shutil.rmtree(state, ignore_errors=True)


def check_model(checks: Checks, config: ServeConfig, args: Namespace, modules: Sequence[str], memory: Memory) -> None:
    """Checks the adapters and the memory against the base model, where its config.json is on this machine."""
    model = read_base(args.model, revision=args.revision, dtype=args.dtype)
    if model is None:
        checks.rows.append(Row(name="base model"))
        return
    if not config.merged:  # a merged model's own check has compared them
        for name, folder in config.adapters.items():
            with checks.step(f"layers of {name}") as row:
                row.found = check_modules(name, folder, model)
    with checks.step("memory") as row:
        row.found = check_memory(
            model,
            memory,
            rank=args.max_lora_rank,
            modules=modules,
            slots=args.max_loras,
            samples=args.max_cpu_loras or args.max_loras,
            k=config.max_samples,
            max_len=args.max_model_len or model.max_model_len,
        )


def adapters_of(adapter_dir: str, trust: TrustRoot | None) -> dict[str, str]:
    """The adapters of a watched folder that can be served now; raises ConfigurationError if there is no such folder."""
    try:
        return adapter_folder.verified(Path(adapter_dir), trust)
    except OSError as error:
        raise ConfigurationError(f"--adapter-dir {adapter_dir} cannot be read: {error.strerror}") from error


def room_for_adapters(given: int, more_can_come: bool) -> int:
    """How many adapters may be served at once when nobody says."""
    return max(given + 2, ADAPTERS_AT_RUN_TIME) if more_can_come else given


def trust_root(path: str | None) -> TrustRoot | None:
    """Reads the trust file, if there is one.

    Raises:
        ConfigurationError: it cannot be used; the message says why.
    """
    try:
        return None if path is None else TrustRoot.load(path)
    except KeyFileError as error:
        raise ConfigurationError(f"--trust: {error}") from error


def verify(
    adapters: Mapping[str, str], store: Path, trust: TrustRoot | None = None
) -> tuple[dict[str, str], int, list[str]]:
    """Verifies every artifact, its signature too where there is a trust root, and copies it to the server's private store.

    Returns:
        Folder of the copy by name, the largest rank, and the union of the adapted modules' last names.

    Raises:
        ConfigurationError: a name is not valid or an artifact is refused; the message holds the reason.
    """
    stored: dict[str, str] = {}
    rank = 1
    modules: set[str] = set()
    if not adapters:
        raise ConfigurationError(NO_ADAPTER)
    for name, path in adapters.items():
        if not ADAPTER_NAME.match(name):
            raise ConfigurationError(f"--adapter: the name {name!r} must match {ADAPTER_NAME.pattern}")
        try:
            artifact = load_artifact(path, store=store, trust=trust)
        except ArtifactError as error:
            raise ConfigurationError(f"--adapter {name}={path} is refused ({error.reason}): {error}") from error
        stored[name] = str(artifact.path)
        rank = max(rank, artifact.config.rank)
        try:
            modules |= adapted_modules(artifact)
        except ArtifactRefused as error:
            raise ConfigurationError(f"--adapter {name}={path} is refused: {error.message}") from error
    return stored, rank, sorted(modules)


def verify_merged(
    base: str, adapters: Mapping[str, str], store: Path, given: Sequence[str], trust: TrustRoot | None = None
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
        model = load_merged(base, store=store, trust=trust)
    except ArtifactError as error:
        raise ConfigurationError(f"the merged model {base} is refused ({error.reason}): {error}") from error
    stored = {names[0] if names else model.name: str(model.artifact.path)}
    try:
        modules = sorted(adapted_modules(model.artifact))
    except ArtifactRefused as error:
        raise ConfigurationError(f"the merged model {base} is refused: {error.message}") from error
    return stored, model.rank, modules, model.dtype


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


def set_environment(config: ServeConfig) -> None:
    """Leaves the configuration where the plugins and vLLM's child processes find it."""
    os.environ[CONFIG_VARIABLE] = config.model_dump_json()
    os.environ[TOKEN_VARIABLE] = secrets.token_hex(16)
    named = [name for name in os.environ.get("VLLM_PLUGINS", "").split(",") if name]
    os.environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*named, "credence", "credence_http"]))
    # vLLM's own choice would be the second runner on GPUs; there ensembles are experimental, so it has to be asked for.
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") or "0"


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
        "--max-num-queued-reqs": [str(config.max_inflight_requests)],
    }
    if config.merged:
        wanted["--served-model-name"] = list(config.adapters)
    if dtype is not None:
        wanted["--dtype"] = [dtype]
    names = {flag.partition("=")[0].replace("_", "-") for flag in given if flag.startswith("--")}
    return [part for flag, values in wanted.items() if flag not in names for part in (flag, *values)]
