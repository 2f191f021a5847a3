"""Agreement of K independent completions, mode ``generate`` (docs/equations.md, section 11)."""

import math
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

_TRAILING = ".,;:!?\u3002\u3001"
_LEADING = "\u00bf\u00a1"
_ENCLOSING = {
    '"': '"',
    "'": "'",
    "`": "`",
    "*": "*",
    "\u201c": "\u201d",
    "\u2018": "\u2019",
    "\u201e": "\u201c",
    "\u00ab": "\u00bb",
    "\u300c": "\u300d",
    "(": ")",
}


def normalise_answer(text: str) -> str:
    """Gives the form under which two completions count as the same answer.

    In this order:

    1. Unicode: the compatibility caseless form of the Unicode Standard (section 3.13, D146) in NFKC. Case, full-width letters, ligatures
       and no-break spaces do not matter.
    2. Every run of whitespace becomes one space, none is left at the ends.
    3. As often as it applies: the marks ``. , ; : ! ?`` and their ideographic forms are dropped at the end, Spanish opening marks at the
       beginning, and one pair of quotation marks, backticks, asterisks or round brackets around the whole is taken off.

    Step 3 stops before nothing is left, so "?" stays "?". Nothing inside the text changes: articles, word order, "1,000" against "1000",
    "-5" against "5", "[0, 1]" against "(0, 1)" and "the answer is 4" against "4" remain different answers. (SQuAD's evaluation also drops
    articles and inner punctuation, which would join "A" with the empty answer and "1.5" with "15".) Applying it twice changes nothing.
    """
    folded = unicodedata.normalize("NFD", text).casefold()
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", folded).casefold())
    answer = " ".join(folded.split())
    while True:
        shorter = _unwrap(answer.rstrip(_TRAILING).lstrip(_LEADING).strip()).strip()
        if not shorter or shorter == answer:
            return answer
        answer = shorter


def _unwrap(text: str) -> str:
    """Takes off one pair of marks around the whole text; '"a" and "b"' and "(a) or (b)" have none."""
    if not text or _ENCLOSING.get(text[0]) != text[-1]:
        return text
    opening, closing, inner = text[0], text[-1], text[1:-1]
    if opening == closing:
        return text if opening in inner.strip(opening) else inner
    depth = 0
    for character in inner:
        depth += (character == opening) - (character == closing)
        if depth < 0:
            return text
    return inner if depth == 0 else text


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerCount:
    """One answer: its normalised text, how many of the K completions give it, and their share count / K."""

    answer: str
    count: int
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How far K completions agree (sequence level).

    Attributes:
        answer: the modal answer, normalised.
        index: the completion that represents it, 0..K-1.
        agreement: share of completions with the modal answer, [1/K, 1]; higher = more certain.
        variation_ratio: 1 - agreement (Freeman, 1965), [0, 1 - 1/K]; higher = more uncertain.
        answer_entropy: entropy of the shares in nats, [0, ln K]; higher = more uncertain. 0 for K = 1.
        answers: every distinct answer, the modal one first.
        answer_K: for each completion the position of its answer in ``answers``.
    """

    answer: str
    index: int
    agreement: float
    variation_ratio: float
    answer_entropy: float
    answers: tuple[AnswerCount, ...]
    answer_K: tuple[int, ...]


def agreement(texts: Sequence[str], mean_log_probs: Sequence[float]) -> Agreement:
    """Computes the modal answer of K completions and how much the samples agree on it.

    Completions are the same answer if :func:`normalise_answer` makes them equal; an empty completion is the answer "". Answers are ordered
    by count, then by the best mean log-probability among their completions, then by their first completion; the first is the modal answer.
    Its representative is its completion of highest mean log-probability, the first of equals.

    Args:
        texts: the K completions.
        mean_log_probs: their mean log-probabilities per token, nats/token; -inf is allowed.

    Raises:
        ValueError: if there is no completion, the lengths differ, or a mean log-probability is NaN.
    """
    if not texts or len(texts) != len(mean_log_probs):
        raise ValueError(
            f"agreement needs at least one completion and one mean log-probability for each, got {len(texts)} texts and "
            f"{len(mean_log_probs)} values"
        )
    if any(math.isnan(value) for value in mean_log_probs):
        raise ValueError(f"mean_log_probs must not be NaN, got {list(mean_log_probs)}")
    k = len(texts)
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for i, text in enumerate(texts):
        groups[normalise_answer(text)].append(i)
    best = {answer: max(members, key=lambda i: (mean_log_probs[i], -i)) for answer, members in groups.items()}
    order = sorted(groups, key=lambda answer: (-len(groups[answer]), -mean_log_probs[best[answer]], groups[answer][0]))
    counts = [len(groups[answer]) for answer in order]
    position = {i: rank for rank, answer in enumerate(order) for i in groups[answer]}
    return Agreement(
        answer=order[0],
        index=best[order[0]],
        agreement=counts[0] / k,
        variation_ratio=(k - counts[0]) / k,
        # ln K - (1/K) sum c ln c: exactly 0 for one answer
        answer_entropy=max(math.log(k) - math.fsum(c * math.log(c) for c in counts) / k, 0.0),
        answers=tuple(AnswerCount(answer=a, count=c, share=c / k) for a, c in zip(order, counts, strict=True)),
        answer_K=tuple(position[i] for i in range(k)),
    )
