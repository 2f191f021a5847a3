"""More than a thousand corrupted artifacts: each is refused with a reason of the closed set, and nothing of it is kept."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from credence.adapters import ArtifactError, TrustRoot, generate_key, load_artifact, sign, write_artifact
from credence.adapters.errors import REASONS
from credence.adapters.signature import key_id
from tests.corrupted import fingerprint, posterior_variants, signature_variants, variants
from tests.tiny import KIND_OF, make_artifact

SHAPES = {"self_attn.q_proj": (6, 5), "mlp.up_proj": (4, 7)}
RANK, ALPHA = 3, 4.5
# What each family is refused for; by the content alone where the manifest describes the corrupted files correctly.
HONEST = ("json", "config", "posterior", "calibration", "tensor", "scale", "safetensors")
BY_CONTENT = {"malformed", "unsupported", "wrong_shape", "not_finite", "missing", "too_large"}
EXPECTED: dict[str, set[str]] = {
    "flip": {"hash_mismatch", "malformed", "unsupported", "missing"},
    "truncate": {"hash_mismatch", "malformed"},
    "append": {"hash_mismatch", "malformed"},
    "missing": {"missing"},
    "symlink": {"symlink"},
    "special": {"malformed", "io", "hash_mismatch", "too_large"},
    "swap": {"hash_mismatch", "malformed"},
    "place": {"missing", "not_a_folder", "symlink", "io"},
    "extra": {"unsupported"},
    "manifest": {"malformed", "unsupported", "hash_mismatch", "too_large"},
    **dict.fromkeys(HONEST, BY_CONTENT),
    "unsigned": {"unsigned"},
    "signature": {"bad_signature", "symlink", "malformed", "too_large"},
}


def good_artifact(path: Path, form: str = "diag", seed: int = 5) -> Path:
    """An artifact with every optional file that it can have."""
    made = make_artifact(
        path,
        form=form,
        seed=seed,
        rank=RANK,
        alpha=ALPHA,
        shapes=SHAPES,
        modules=tuple(SHAPES),
        layers=1,
        tau={8: 1.0},
        temperature={8: 1.5},
    )
    write_artifact(
        path,
        adapter_config=made.adapter_config,
        mean=made.mean,
        posteriors=made.posteriors,
        config=made.config,
        calibration=made.calibration,
        metrics={"accuracy": 0.75},
        card="# A card\n",
        run_config="lora: {r: 3}\n",
        replace=True,
    )
    return path


def refusals(good: Path, made: Iterator[tuple[str, Path]], store: Path, trust: TrustRoot | None = None) -> Counter[str]:
    """Loads every variant, and counts the reasons."""
    untouched, count, wrong = fingerprint(good), Counter[str](), []
    for name, path in made:
        assert fingerprint(path) != untouched, f"{name} is the good artifact"
        family = name.partition(" ")[0]
        try:
            load_artifact(path, store=store, trust=trust)
            wrong.append(f"{name}: accepted")
        except ArtifactError as error:
            count[error.reason] += 1
            misdescribed = family in HONEST and "other tensors than its manifest entry" in str(error)
            if error.reason not in EXPECTED[family] or misdescribed:
                wrong.append(f"{name}: {error.reason}: {error}")
        except BaseException as error:  # whatever else escapes is what this test looks for
            wrong.append(f"{name}: {type(error).__name__} escaped: {error}")
    assert not wrong, "\n".join(wrong)
    assert not store.exists(), "something was kept"
    assert fingerprint(good) == untouched and load_artifact(good, trust=trust).digest
    return count


@pytest.mark.timeout(120)
def test_every_corrupted_variant_is_refused(tmp_path: Path) -> None:
    good = good_artifact(tmp_path / "good")
    count = refusals(good, variants(good, tmp_path / "variants"), tmp_path / "store")
    assert count.total() >= 700
    assert set(count) == set(REASONS) - {"exists", "unsigned", "bad_signature"}, "every reason that reading has"


@pytest.mark.parametrize("form", sorted(set(KIND_OF) - {"diag"}))
def test_every_corrupted_posterior_is_refused(tmp_path: Path, form: str) -> None:
    good = good_artifact(tmp_path / "good", form)
    count = refusals(good, posterior_variants(good, tmp_path / "variants"), tmp_path / "store")
    assert count.total() >= (13 if form in ("point", "mask") else 30)


def test_where_a_signature_is_required_only_the_signed_artifact_is_loaded(tmp_path: Path) -> None:
    good, other = (good_artifact(tmp_path / name, seed=seed) for name, seed in (("good", 1), ("other", 2)))
    key, stranger = generate_key(), generate_key()
    trust = TrustRoot({key_id(key.public_key()): key.public_key()})
    for folder in (good, other):
        sign(folder, key)
    made = signature_variants(good, other, tmp_path / "variants", lambda folder: sign(folder, stranger))
    count = refusals(good, made, tmp_path / "store", trust)
    assert count["unsigned"] == 1 and count["bad_signature"] >= 50


def test_a_required_signature_stops_every_corrupted_variant_too(tmp_path: Path) -> None:
    """Those with an honest manifest among them, which no hash gives away."""
    good = good_artifact(tmp_path / "good")
    key = generate_key()
    sign(good, key)
    trust = TrustRoot({key_id(key.public_key()): key.public_key()})
    count: Counter[str] = Counter()
    for name, path in variants(good, tmp_path / "variants"):
        with pytest.raises(ArtifactError) as caught:
            load_artifact(path, trust=trust)
        if name.partition(" ")[0] in (*HONEST, "manifest"):
            assert caught.value.reason in ("bad_signature", "too_large"), name
        count[caught.value.reason] += 1
    assert count["bad_signature"] >= 400
