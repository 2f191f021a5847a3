"""MC-dropout (Gal and Ghahramani, ICML 2016): LoRA trained like ``map`` with PEFT's dropout on its input, and dropout kept for prediction.

Training draws a mask for every token, as PEFT does. Serving draws one mask per sample (credence.adapters.kinds.mask), because a sample has
to be an ordinary LoRA: over the samples each token sees the same distribution of masks, but the tokens of one sample share theirs.
"""

from collections.abc import Sequence
from typing import ClassVar

from credence.adapters.kinds import MaskPosterior
from credence.adapters.posterior import Posterior
from credence.training.config import Section
from credence.training.errors import ConfigError
from credence.training.methods.base import Method
from credence.training.modeling import ADAPTER, LoraSite


class McDropout(Method):
    """AdamW on A and B under dropout with probability ``lora.dropout``, which is also the posterior's p.

    Of a given adapter that was trained with dropout it makes a posterior without steps: set lora.dropout to what it was trained with.

    Raises:
        ConfigError: ``lora.dropout`` is 0, or the sites are members of an ensemble, which are trained without dropout.
    """

    name: ClassVar[str] = "mcdropout"
    can_be_member: ClassVar[bool] = False
    kind: ClassVar[str] = "mask"
    needs_steps: ClassVar[bool] = False

    def __init__(self, settings: Section, sites: Sequence[LoraSite]) -> None:
        super().__init__(settings, sites)
        self.p = _dropout(self.sites[0])

    def posteriors(self) -> dict[str, Posterior]:
        """Kind ``mask`` with the training's p."""
        return {site.name: MaskPosterior(p=self.p) for site in self.sites}

    def posterior_settings(self) -> dict[str, float]:
        """p."""
        return {"p": self.p}


def _dropout(site: LoraSite) -> float:
    dropouts = getattr(site.layer, "lora_dropout", None)
    if dropouts is None:
        raise ConfigError(
            "mcdropout cannot be a member of an ensemble: members are stacked factors, and PEFT's dropout acts on their common input; "
            "choose another method for the members, or train mcdropout alone",
            key="method",
        )
    p = getattr(dropouts[ADAPTER], "p", 0.0)
    if not p > 0:
        raise ConfigError(
            "lora.dropout is 0; mcdropout trains with dropout and serves its masks, so set lora.dropout above 0, for example 0.1",
            key="lora.dropout",
        )
    return float(p)
