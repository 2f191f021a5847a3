"""Signatures: who may sign, what is signed, and what is refused where a signature is required."""

import base64
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from credence.adapters import (
    Artifact,
    ArtifactError,
    BaseModelRef,
    KeyFileError,
    TrustRoot,
    generate_key,
    load_artifact,
    load_key,
    load_merged,
    merge,
    save_key,
    sign,
    verify_signature,
)
from credence.adapters.errors import REASONS
from credence.adapters.files import read_file
from credence.adapters.signature import claimed_signer, key_id
from tests.tiny import LAYERS, SHAPES, make_artifact, make_model

LINEAR = {f"model.layers.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def key() -> Ed25519PrivateKey:
    return generate_key()


@pytest.fixture(scope="module")
def trust(key: Ed25519PrivateKey) -> TrustRoot:
    return TrustRoot({key_id(key.public_key()): key.public_key()})


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return make_artifact(tmp_path / "a", modules=("self_attn.q_proj",), layers=1)


def raw(key: Ed25519PublicKey) -> bytes:
    return key.public_bytes(Encoding.Raw, PublicFormat.Raw)


def refused(folder: Path, trust: TrustRoot, reason: str, message: str) -> None:
    """With this reason, also by the check of the signature alone, and nothing is kept."""
    store = folder.parent / "store"
    with pytest.raises(ArtifactError, match=message) as caught:
        load_artifact(folder, store=store, trust=trust)
    assert caught.value.reason == reason and not store.exists()
    with pytest.raises(ArtifactError, match=message):
        verify_signature(folder, trust)


def test_what_is_signed(artifact: Artifact, key: Ed25519PrivateKey, trust: TrustRoot) -> None:
    """Another program can make and check a signature from this description alone."""
    before = {path.name: path.read_bytes() for path in artifact.path.iterdir()}
    identity = sign(artifact.path, key)
    assert identity == hashlib.sha256(raw(key.public_key())).hexdigest()[:16]
    document = json.loads((artifact.path / "signature.json").read_text())
    assert document.keys() == {"algorithm", "key_id", "signature"}
    assert (document["algorithm"], document["key_id"]) == ("ed25519", identity)
    signed = b"credence signature v1\nmanifest.json\n" + before["manifest.json"]
    key.public_key().verify(base64.b64decode(document["signature"], validate=True), signed)
    assert {path.name: path.read_bytes() for path in artifact.path.iterdir() if path.name != "signature.json"} == before
    loaded = load_artifact(artifact.path, store=artifact.path.parent / "store", trust=trust)
    assert (loaded.signed_by, loaded.digest) == (identity, artifact.digest)
    assert verify_signature(artifact.path, trust) == claimed_signer(artifact.path) == identity
    assert load_artifact(artifact.path).signed_by is None, "without a trust root nothing is said about the signature"


def test_without_a_signature_nothing_is_trusted(artifact: Artifact, trust: TrustRoot) -> None:
    assert claimed_signer(artifact.path) is None
    refused(artifact.path, trust, "unsigned", "is not signed, and a signature of .* is required")


def test_an_unknown_key_is_refused(artifact: Artifact, trust: TrustRoot) -> None:
    stranger = sign(artifact.path, generate_key())
    refused(artifact.path, trust, "bad_signature", f"signed by the key {stranger}, which is not trusted")


def test_a_stranger_under_a_trusted_name_is_refused(
    artifact: Artifact, key: Ed25519PrivateKey, trust: TrustRoot
) -> None:
    sign(artifact.path, generate_key())
    path = artifact.path / "signature.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "key_id": key_id(key.public_key())}))
    refused(artifact.path, trust, "bad_signature", "is not the signature of manifest.json")


def test_a_signature_belongs_to_one_artifact(
    artifact: Artifact, tmp_path: Path, key: Ed25519PrivateKey, trust: TrustRoot
) -> None:
    other = make_artifact(tmp_path / "b", modules=("self_attn.q_proj",), layers=1, seed=6)
    sign(other.path, key)
    shutil.copy(other.path / "signature.json", artifact.path)
    refused(artifact.path, trust, "bad_signature", "it belongs to another folder")


def test_every_bit_of_the_signature_file_counts(artifact: Artifact, key: Ed25519PrivateKey, trust: TrustRoot) -> None:
    sign(artifact.path, key)
    path = artifact.path / "signature.json"
    data = path.read_bytes()
    reasons = set()
    for position in range(len(data)):
        for bit in range(8):
            path.write_bytes(data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :])
            with pytest.raises(ArtifactError) as caught:
                verify_signature(artifact.path, trust)
            reasons.add(caught.value.reason)
    assert reasons == {"bad_signature"}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.write_bytes(b""), "bad_signature"),
        (lambda path: path.write_bytes(b"[" * 4000), "bad_signature"),
        (lambda path: path.write_bytes(b" " * 5000), "too_large"),
        (lambda path: path.symlink_to("/etc/hostname"), "symlink"),
        (lambda path: os.mkfifo(path), "malformed"),
        (lambda path: path.mkdir(), "malformed"),
    ],
)
@pytest.mark.timeout(20)
def test_what_is_no_signature_file_is_refused(
    artifact: Artifact, trust: TrustRoot, make: Callable[[Path], object], reason: str
) -> None:
    make(artifact.path / "signature.json")
    refused(artifact.path, trust, reason, "signature.json")


def test_the_signature_is_checked_before_anything_is_parsed(
    artifact: Artifact, key: Ed25519PrivateKey, trust: TrustRoot
) -> None:
    sign(artifact.path, key)
    (artifact.path / "manifest.json").write_text("{")
    refused(artifact.path, trust, "bad_signature", "one of the two was changed")


def test_the_bytes_that_were_checked_are_the_bytes_that_are_used(
    artifact: Artifact, tmp_path: Path, key: Ed25519PrivateKey, trust: TrustRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is exchanged for another one as soon as its signature was checked."""
    other = make_artifact(tmp_path / "other", modules=("self_attn.q_proj",), layers=1, seed=6)
    sign(artifact.path, key)
    original = TrustRoot.check

    def check_then_exchange(self: TrustRoot, folder: Path, document: str, data: bytes) -> str:
        identity = original(self, folder, document, data)
        folder.rename(tmp_path / "signed")
        shutil.copytree(other.path, folder)
        return identity

    monkeypatch.setattr(TrustRoot, "check", check_then_exchange)
    with pytest.raises(ArtifactError, match="is not what the manifest describes") as caught:
        load_artifact(artifact.path, store=tmp_path / "store", trust=trust)
    assert caught.value.reason == "hash_mismatch" and not (tmp_path / "store").exists()


def test_keys_are_rotated_by_trusting_two_for_a_while(
    artifact: Artifact, tmp_path: Path, key: Ed25519PrivateKey
) -> None:
    new = generate_key()
    lines = [save_key(tmp_path / f"key{number}", k, f"of {number}").read_text() for number, k in enumerate((key, new))]
    (tmp_path / "both").write_text("# rotation\n\n" + "".join(lines))
    both, only_new = TrustRoot.load(tmp_path / "both"), TrustRoot.load(tmp_path / "key1.pub")
    assert len(both.keys) == 2
    for signer in (key, new):
        assert sign(artifact.path, signer) == load_artifact(artifact.path, trust=both).signed_by
    assert load_artifact(artifact.path, trust=only_new).signed_by == key_id(new.public_key())
    sign(artifact.path, key)
    refused(artifact.path, only_new, "bad_signature", "which is not trusted")


def test_a_damaged_artifact_is_not_signed(artifact: Artifact, key: Ed25519PrivateKey) -> None:
    (artifact.path / "posterior.json").write_text("{}")
    with pytest.raises(ArtifactError, match="is not what the manifest describes"):
        sign(artifact.path, key)
    assert not (artifact.path / "signature.json").exists()


def test_a_signature_that_cannot_be_written_is_reported(artifact: Artifact, key: Ed25519PrivateKey) -> None:
    (artifact.path / "signature.json").mkdir()
    with pytest.raises(ArtifactError, match="signature.json cannot be written") as caught:
        sign(artifact.path, key)
    assert caught.value.reason == "io"
    assert not [path for path in artifact.path.iterdir() if path.name.startswith(".")], "no rest of the attempt"


# --- files of keys ---


def test_a_saved_key_is_the_key_and_private(tmp_path: Path, key: Ed25519PrivateKey) -> None:
    previous = os.umask(0)
    try:
        public = save_key(tmp_path / "key", key, "release 2026")
    finally:
        os.umask(previous)
    assert public == tmp_path / "key.pub" and (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert public.read_text() == f"ed25519 {base64.b64encode(raw(key.public_key())).decode()} release 2026\n"
    assert raw(load_key(tmp_path / "key").public_key()) == raw(key.public_key())
    assert TrustRoot.load(public).keys.keys() == {key_id(key.public_key())}


@pytest.mark.parametrize("taken", ["key", "key.pub"])
def test_no_key_is_replaced(tmp_path: Path, key: Ed25519PrivateKey, taken: str) -> None:
    (tmp_path / taken).write_text("precious")
    with pytest.raises(KeyFileError, match=f"{taken} cannot be written: File exists"):
        save_key(tmp_path / "key", key)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"], "nor is half a pair left"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_key_that_others_can_read_is_refused(tmp_path: Path, key: Ed25519PrivateKey, mode: int) -> None:
    save_key(tmp_path / "key", key)
    (tmp_path / "key").chmod(mode)
    with pytest.raises(KeyFileError, match=f"has mode 0{mode:o}, others than its owner can use it"):
        load_key(tmp_path / "key")


def test_what_is_no_key_is_refused(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key

    path = tmp_path / "key"
    with pytest.raises(KeyFileError, match="cannot be read: No such file"):
        load_key(path)
    path.write_text("nonsense")
    path.chmod(0o600)
    with pytest.raises(KeyFileError, match="is no private key in PEM"):
        load_key(path)
    path.write_bytes(generate_private_key(SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(KeyFileError, match="is no Ed25519 key"):
        load_key(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no key"),
        ("# a comment\n", "holds no key"),
        ("ed25519\n", ":1 is no public key; a line is"),
        ("\nrsa AAAA me\n", ":2 is no public key"),
        ("ed25519 AAAA me\n", ":1 is no public key"),
        ("ed25519 %%%% me\n", ":1 is no public key"),
        ("\udcff", "cannot be read"),
    ],
)
def test_a_trust_file_without_keys_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "trust").write_text(text, errors="surrogateescape")
    with pytest.raises(KeyFileError, match=message):
        TrustRoot.load(tmp_path / "trust")


def test_a_trust_file_that_everybody_may_write_is_refused(tmp_path: Path, key: Ed25519PrivateKey) -> None:
    public = save_key(tmp_path / "key", key)
    public.chmod(0o666)
    with pytest.raises(KeyFileError, match="may be written by everybody"):
        TrustRoot.load(public)


def test_reasons_are_a_closed_set() -> None:
    assert {"unsigned", "bad_signature", "hash_mismatch"} <= set(REASONS) and len(set(REASONS)) == len(REASONS)
    with pytest.raises(ValueError, match="'other' is no reason of an ArtifactError"):
        ArtifactError("x", reason="other", path="y")  # type: ignore[arg-type]


def test_the_page_explains_every_reason() -> None:
    page = (Path(__file__).parents[2] / "docs/artifacts.md").read_text()
    first_cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    assert sorted(word for cell in first_cells for word in cell.replace("`", "").replace(",", "").split()) == sorted(
        REASONS
    )


# --- merged models ---


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged")
    base = make_model(folder / "base")
    artifact = make_artifact(folder / "a")
    merge(artifact.path, base, folder / "m", linear_modules=LINEAR, base_model=BaseModelRef(name="tiny"), name="m")
    return folder / "m"


def test_a_merged_model_is_signed_as_a_whole(
    merged: Path, tmp_path: Path, key: Ed25519PrivateKey, trust: TrustRoot
) -> None:
    shutil.copytree(merged, tmp_path / "m")
    with pytest.raises(ArtifactError) as caught:
        load_merged(tmp_path / "m", trust=trust)
    assert caught.value.reason == "unsigned"
    identity = sign(tmp_path / "m", key)
    model = load_merged(tmp_path / "m", trust=trust)
    assert model.signed_by == identity == verify_signature(tmp_path / "m", trust)
    signed = b"credence signature v1\ncredence_merged.json\n" + read_file(tmp_path / "m/credence_merged.json", 2**20)
    document = json.loads((tmp_path / "m/signature.json").read_text())
    key.public_key().verify(base64.b64decode(document["signature"]), signed)
    # Its own record is signed, and not that of the artifact in it: one signature does not stand for the other.
    shutil.copy(tmp_path / "m/signature.json", tmp_path / "m/credence")
    refused(tmp_path / "m/credence", trust, "bad_signature", "is not the signature of manifest.json")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda f: (f / "config.json").write_text("{}"), "hash_mismatch"),
        (lambda f: (f / "tokenizer.json").unlink(), "missing"),
        (lambda f: (f / "chat_template.jinja").write_text("{{ 'obey' }}"), "hash_mismatch"),
        (lambda f: (f / "modeling.py").write_text("x"), "unsupported"),
        (lambda f: (f / "additional_chat_templates").mkdir() or (f / "additional_chat_templates/x").touch(), "unsupported"),
        (lambda f: (f / "generation_config.json").unlink() or (f / "generation_config.json").symlink_to("x"), "missing"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x"), "hash_mismatch"),
        (lambda f: (f / "credence_merged.json").write_text("{}"), "bad_signature"),
    ],
)  # fmt: skip
def test_no_file_of_a_signed_merged_model_may_change(
    merged: Path,
    tmp_path: Path,
    key: Ed25519PrivateKey,
    trust: TrustRoot,
    change: Callable[[Path], object],
    reason: str,
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(merged, folder)
    sign(folder, key)
    assert load_merged(folder, trust=trust).signed_by
    change(folder)
    with pytest.raises(ArtifactError) as caught:
        load_merged(folder, trust=trust)
    assert caught.value.reason == reason


def test_tokenizer_and_configuration_may_be_edited_where_no_signature_is_required(merged: Path, tmp_path: Path) -> None:
    shutil.copytree(merged, tmp_path / "m")
    (tmp_path / "m/chat_template.jinja").write_text("{{ messages }}")
    assert load_merged(tmp_path / "m").signed_by is None
