import importlib
import pkgutil
import subprocess
import sys

import credence.clients


def test_public_names_are_sorted_and_exist() -> None:
    assert list(credence.clients.__all__) == sorted(credence.clients.__all__)
    for name in credence.clients.__all__:
        assert getattr(credence.clients, name).__module__.startswith("credence.clients.")


def test_every_error_answer_and_option_type_is_public() -> None:
    internal = {"AdapterList", "ChatRequest", "Chunk", "CompletionRequest", "EventDecoder", "Increment", "ModelList"}
    internal |= {"ScoreRequest", "StreamOptions"}
    for module in (f"credence.clients.{name}" for name in ("errors", "requests", "streaming", "types")):
        for name, value in vars(importlib.import_module(module)).items():
            if isinstance(value, type) and value.__module__ == module and name.isidentifier() and name[0] != "_":
                assert name in credence.clients.__all__ or name in internal, name


def test_importing_the_client_pulls_nothing_heavy() -> None:
    heavy = ("torch", "vllm", "fastapi", "transformers", "numpy", "safetensors", "peft")
    modules = [f"credence.clients.{module.name}" for module in pkgutil.iter_modules(credence.clients.__path__)]
    program = f"import sys, {', '.join(modules)}; print([name for name in {heavy!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
