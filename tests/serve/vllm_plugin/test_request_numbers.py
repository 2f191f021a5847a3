"""Numbers of a request that float32 cannot hold are refused at the door: in the worker they would end the engine."""

import pytest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

from credence.serve.errors import BadRequest
from credence.serve.vllm_plugin.bodies import parse


@pytest.mark.parametrize(
    ("field", "value"),
    [("repetition_penalty", 3.67e-180), ("repetition_penalty", 1e300), ("temperature", 1e308)],
)
def test_numbers_beyond_float32_are_refused(field: str, value: float) -> None:
    with pytest.raises(BadRequest, match=f"{field} must be"):
        parse(CompletionRequest, {"model": "m", "prompt": "a", field: value})


@pytest.mark.parametrize(("field", "value"), [("repetition_penalty", 1.2), ("temperature", 0.0), ("temperature", 2.0)])
def test_ordinary_numbers_pass(field: str, value: float) -> None:
    assert getattr(parse(CompletionRequest, {"model": "m", "prompt": "a", field: value}), field) == value


def test_a_value_that_trips_the_validators_is_refused() -> None:
    with pytest.raises(BadRequest, match="wrong type"):
        parse(CompletionRequest, {"model": "m", "prompt": "a", "structured_outputs": False})
