"""Configurations under which vLLM would serve `uncertainty` wrongly, or ignore it, are refused."""

from argparse import Namespace
from importlib.metadata import EntryPoint
from types import SimpleNamespace
from typing import Any

import pytest

from credence.serve.config import ServeConfig
from credence.serve.errors import ConfigurationError
from credence.serve.launcher import set_environment
from credence.serve.vllm_plugin import endpoint, server
from credence.serve.vllm_plugin.scheduler import GangAsyncScheduler, GangScheduler, gang_scheduler

GANG = server.SCHEDULER
STOCK = "vllm.v1.core.sched.scheduler.Scheduler"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CREDENCE_SERVE_CONFIG", "CREDENCE_PLUGIN_TOKEN", "VLLM_PLUGINS", "VLLM_USE_V2_MODEL_RUNNER"):
        monkeypatch.setenv(name, "")
    set_environment(ServeConfig(adapters={"a": "/a"}, max_samples=8, state_dir="/s", stats_dir="/t"))


def arguments(**changes: Any) -> Namespace:
    values = {"max_num_seqs": None, "max_loras": 9, "api_server_count": None, "scheduler_cls": GANG}
    return Namespace(**{**values, **changes})


def test_the_launchers_own_arguments_pass() -> None:
    server.check_arguments(arguments())
    server.check_entry_points()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scheduler_cls": STOCK}, "would not keep the members"),
        ({"max_loras": 7}, "--max-loras of at least 8, it is 7"),
        ({"max_num_seqs": 4}, "--max-num-seqs of at least 8, it is 4"),
        ({"api_server_count": 2}, "--api-server-count 1"),
    ],
)
def test_arguments(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        server.check_arguments(arguments(**change))


def engine(**changes: Any) -> Any:
    """An engine client's configuration, as far as the plugin looks at it."""
    values: dict[str, Any] = {
        "scheduler": GangScheduler,
        "asynchronous": False,
        "lora": object(),
        "speculative": None,
        "replicas": 1,
    }
    values |= changes
    return SimpleNamespace(
        vllm_config=SimpleNamespace(
            scheduler_config=SimpleNamespace(
                async_scheduling=values["asynchronous"], get_scheduler_cls=lambda: values["scheduler"]
            ),
            lora_config=values["lora"],
            speculative_config=values["speculative"],
            parallel_config=SimpleNamespace(data_parallel_size=values["replicas"]),
        )
    )


def test_engines_that_pass() -> None:
    endpoint.check_engine(engine(), Namespace())
    endpoint.check_engine(engine(asynchronous=True, scheduler=GangAsyncScheduler), Namespace())
    endpoint.check_engine(engine(scheduler=gang_scheduler), Namespace())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scheduler": dict}, "scheduler dict"),
        ({"asynchronous": True}, "scheduler GangScheduler, ensembles need"),
        ({"lora": None}, "without LoRA"),
        ({"speculative": object()}, "speculative"),
        ({"replicas": 2}, "one server per replica"),
    ],
)
def test_a_plain_vllm_serve_with_our_plugin_refuses_what_it_cannot_do(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        endpoint.check_engine(engine(**change), Namespace())


def test_several_api_processes() -> None:
    with pytest.raises(ConfigurationError, match="--api-server-count 1"):
        endpoint.check_engine(engine(), Namespace(api_server_count=2))


@pytest.mark.parametrize("group", list(server.PLUGINS))
def test_a_missing_or_foreign_plugin_is_noticed_before_the_engine_starts(
    monkeypatch: pytest.MonkeyPatch, group: str
) -> None:
    """vLLM only logs a plugin it cannot load, and then answers `uncertainty` with a 200 and nothing."""
    from importlib.metadata import entry_points

    foreign = EntryPoint(name=server.PLUGINS[group][0], value="builtins:dict", group=group)
    for replacement in ([], [foreign]):
        monkeypatch.setattr(
            server, "entry_points", lambda group, g=group, r=replacement: r if group == g else entry_points(group=group)
        )
        with pytest.raises(ConfigurationError, match="reinstall credence"):
            server.check_entry_points()


@pytest.mark.parametrize(("rank", "allowed"), [(1, 1), (2, 8), (16, 16), (24, 32), (512, 512)])
def test_lora_rank(rank: int, allowed: int) -> None:
    assert server.smallest_lora_rank(rank) == allowed


def test_lora_rank_too_large() -> None:
    with pytest.raises(ConfigurationError, match="rank 513"):
        server.smallest_lora_rank(513)


def test_a_server_without_its_plugin_does_not_start() -> None:
    """The check that runs after vLLM has built its application."""
    import asyncio

    async def init_app_state(*_: Any) -> None:
        """What vLLM does when the endpoint plugin failed to import: nothing."""

    checked = server._checked(init_app_state, [])
    with pytest.raises(ConfigurationError, match="without the credence endpoint plugin"):
        asyncio.run(checked(None, SimpleNamespace(credence=None), None))
