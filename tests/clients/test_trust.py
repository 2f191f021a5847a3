"""Whether an answer is sure enough: every choice, no confidence, no calibration."""

from typing import Any

import httpx2
import pytest

from credence.clients import Abstained, ChatCompletion, Completion, CredenceError, Score, Uncertainty
from tests.clients.answers import UNCERTAINTY, Script, chat_completion, completion, score
from tests.clients.conftest import Connect


def scores(**changes: Any) -> dict[str, Any]:
    return UNCERTAINTY | changes


def answer(*uncertainties: dict[str, Any] | None, **changes: Any) -> Completion:
    return Completion.model_validate(completion(*uncertainties, **changes))


@pytest.mark.parametrize(
    ("confidence", "threshold", "trusted"),
    [(0.83, 0.8, True), (0.83, 0.83, True), (0.83, 0.84, False), (0.0, 0.0, True), (0.0, 0, True), (1.0, 1, True)],
)
def test_a_confidence_is_compared_with_the_threshold(confidence: float, threshold: float, trusted: bool) -> None:
    """As the server's flag is: a confidence equal to the threshold is enough."""
    uncertainty = scores(confidence=confidence)
    for given in (
        answer(uncertainty),
        answer(uncertainty).choices[0],
        answer(uncertainty).uncertainty,
        ChatCompletion.model_validate(chat_completion(uncertainty)),
        ChatCompletion.model_validate(chat_completion(uncertainty)).choices[0],
        Score.model_validate(score(uncertainty)),
    ):
        assert given is not None and given.trust(threshold) is trusted
        if trusted:
            assert given.require_trust(threshold) is given
        else:
            with pytest.raises(Abstained) as caught:
                given.require_trust(threshold)
            assert caught.value.answer is given


def test_no_confidence_is_never_trusted() -> None:
    for given, why in (
        (answer(None), "choice 0 has no uncertainty: ask with uncertainty=True"),
        (answer(scores(confidence=None)), "choice 0 has no confidence"),
    ):
        assert not given.trust(0.0)
        with pytest.raises(Abstained, match=why) as caught:
            given.require_trust(0.0)
        assert caught.value.confidence is None


def test_every_choice_must_be_trusted() -> None:
    given = answer(scores(confidence=0.9), scores(confidence=0.6), scores(confidence=0.7))
    assert given.trust(0.6) and not given.trust(0.65)
    with pytest.raises(
        Abstained, match="^the answer is not to be trusted at 0.8: choice 1 has confidence 0.6; choice 2"
    ) as e:
        given.require_trust(0.8)
    assert (e.value.confidence, e.value.threshold, e.value.choice_indices) == (0.6, 0.8, (1, 2))
    assert given.choices[0].trust(0.8)
    assert not answer(scores(), None).trust(0.1)


@pytest.mark.parametrize("calibrated", [True, False, None])
def test_a_confidence_without_calibration_counts_unless_calibration_is_required(calibrated: bool | None) -> None:
    given = answer(scores(calibrated=calibrated))
    assert given.trust(0.8)
    assert given.trust(0.8, require_calibrated=True) is (calibrated is True)
    if not calibrated:
        with pytest.raises(Abstained, match="choice 0 has confidence 0.83, which is not calibrated") as caught:
            given.require_trust(0.8, require_calibrated=True)
        assert caught.value.confidence == 0.83


def test_what_abstained_carries(client: Connect) -> None:
    script = Script(httpx2.Response(200, json=completion(UNCERTAINTY), headers={"X-Request-Id": "r-8"}))
    given = client(script).complete("p", model="m", uncertainty=True)
    with pytest.raises(CredenceError) as caught:
        given.require_trust(0.9)
    raised = caught.value
    assert isinstance(raised, Abstained) and raised.answer is given
    assert (raised.confidence, raised.threshold, raised.request_id, raised.status) == (0.83, 0.9, "r-8", None)
    assert str(raised) == "the answer is not to be trusted at 0.9: choice 0 has confidence 0.83 (request id r-8)"


@pytest.mark.parametrize("threshold", [-0.1, 1.1, 90, float("nan"), True, "0.5", None])
def test_a_threshold_is_a_probability(threshold: Any) -> None:
    for given in (answer(scores()), Uncertainty.model_validate(scores())):
        with pytest.raises(ValueError, match="threshold is .*; give a probability between 0 and 1"):
            given.trust(threshold)
        with pytest.raises(ValueError, match="threshold is"):
            given.require_trust(threshold)
