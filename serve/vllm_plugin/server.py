"""vLLM's own server, started so that it cannot come up without our plugins.

vLLM only logs when a plugin cannot be imported, and then serves without it: ``uncertainty`` would be ignored with a 200. And when
its engine process dies, its server ends with exit code 0. Both are put right here.
"""

import logging
from argparse import Namespace
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any, NoReturn

import uvloop
from starlette.datastructures import State
from vllm import envs
from vllm.config.lora import MaxLoRARanks
from vllm.entrypoints.launchers.api_server import entry
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.logger import configure_logging_from_args
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.import_utils import resolve_obj_by_qualname

from credence.serve.config import from_environment
from credence.serve.ensemble import check_limits
from credence.serve.errors import ConfigurationError
from credence.serve.keys import take_vllm_keys
from credence.serve.preflight import GIB, Memory, host_memory
from credence.serve.vllm_plugin import endpoint, general, logits_processor
from credence.serve.vllm_plugin.scheduler import GangAsyncScheduler, GangScheduler, gang_scheduler

logger = logging.getLogger(__name__)

SCHEDULER = f"{gang_scheduler.__module__}.{gang_scheduler.__name__}"

PLUGINS = {
    "vllm.general_plugins": ("credence", general.register),
    "vllm.endpoint_plugins": ("credence_http", endpoint.CredenceEndpointPlugin),
    "vllm.logits_processors": ("credence", logits_processor.EnsembleLogitsProcessor),
}


def parse(argv: Sequence[str]) -> Namespace:
    """vLLM's own command line, checked as far as it can be without an engine.

    Args:
        argv: without the program name.

    Raises:
        ConfigurationError: a flag vLLM does not have or refuses, or under which an ensemble could not be answered.
    """
    check_entry_points()
    cli_env_setup()
    parser = make_arg_parser(FlexibleArgumentParser(prog="credence serve", description="vLLM's options"))
    parser.error = _refuse
    args: Namespace = parser.parse_args(list(argv))
    configure_logging_from_args(args)
    try:
        validate_parsed_serve_args(args)
    except (TypeError, ValueError) as error:
        _refuse(str(error))
    check_arguments(args)
    return args


def memory(args: Namespace) -> Memory:
    """Memory that the engine will have. Of a GPU this is all of it; what other processes hold is seen only by the engine."""
    kv_bytes = args.kv_cache_memory_bytes
    if not current_platform.is_cpu():
        total = current_platform.get_device_total_memory() * args.tensor_parallel_size
        if kv_bytes is not None:
            kv_bytes *= args.tensor_parallel_size
        share = args.gpu_memory_utilization
        return Memory(total=total, available=total, share=share, kv_bytes=kv_bytes, holds_samples=False)
    if envs.VLLM_CPU_KVCACHE_SPACE:
        kv_bytes = envs.VLLM_CPU_KVCACHE_SPACE * GIB
    total, available = host_memory()
    share = args.gpu_memory_utilization
    return Memory(total=total, available=available, share=share, kv_bytes=kv_bytes, holds_samples=True)


def run(args: Namespace) -> int:
    """Serves until a signal or the engine's end.

    Args:
        args: of :func:`parse`.

    Returns:
        0 after an orderly shutdown, 1 if the engine died or a request was cut off.

    Raises:
        ConfigurationError: a plugin did not start.
    """
    # vLLM's own door stands before ours, knows no key file, and leaves open what does not begin with /v1.
    args.credence_key_hashes = take_vllm_keys(args)
    states: list[State] = []
    entry.init_app_state = _checked(entry.init_app_state, states)
    uvloop.run(entry.run_server(args))
    backend = states[0].credence if states else None
    if backend is None or backend.engine_died:
        logger.error("The engine died; the server exits with code 1")
        return 1
    if backend.drain.cut_off:
        logger.error(
            "Requests were cut off: the shutdown was forced, or took longer than --shutdown-timeout; exit code 1"
        )
        return 1
    return 0


def _refuse(message: str) -> NoReturn:
    raise ConfigurationError(
        f"vLLM's flags: {message}; `credence serve --help` lists ours, vLLM's documentation its own"
    )


def check_arguments(args: Namespace) -> None:
    """Refuses, before the engine is built, arguments under which an ensemble could not be answered; raises ConfigurationError."""
    check_limits(from_environment(), max_num_seqs=args.max_num_seqs, max_loras=args.max_loras)
    if (getattr(args, "api_server_count", None) or 1) > 1:
        raise ConfigurationError("several API processes would not see each other's samples; use --api-server-count 1")
    chosen = resolve_obj_by_qualname(args.scheduler_cls) if isinstance(args.scheduler_cls, str) else args.scheduler_cls
    if chosen not in (gang_scheduler, GangScheduler, GangAsyncScheduler):
        raise ConfigurationError(
            f"--scheduler-cls {args.scheduler_cls} would not keep the members of an ensemble together; leave the flag out"
        )


def check_entry_points() -> None:
    """Raises ConfigurationError unless vLLM will find each of our plugins where it looks for them."""
    for group, (name, target) in PLUGINS.items():
        found = [point for point in entry_points(group=group) if point.name == name]
        if len(found) != 1 or found[0].load() is not target:
            raise ConfigurationError(
                f"the plugin {name} of {group} is registered {len(found)} times or by another package; "
                "reinstall credence in this environment"
            )


def smallest_lora_rank(rank: int) -> int:
    """The smallest ``--max-lora-rank`` vLLM accepts that holds ``rank``.

    Raises:
        ConfigurationError: if there is none.
    """
    ranks = sorted(int(value) for value in MaxLoRARanks.__args__)
    for allowed in ranks:
        if allowed >= rank:
            return allowed
    raise ConfigurationError(f"an adapter has rank {rank}, vLLM serves at most {ranks[-1]}")


def _checked(init_app_state: Any, states: list[State]) -> Any:
    async def checked(engine_client: Any, state: State, args: Any, supported_tasks: Any = None) -> None:
        await init_app_state(engine_client, state, args, supported_tasks)
        if getattr(state, "credence", None) is None:
            raise ConfigurationError(
                "vLLM started without the credence endpoint plugin; see its log for the import error"
            )
        states.append(state)

    return checked
