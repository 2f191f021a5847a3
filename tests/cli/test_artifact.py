import json
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from credence.adapters import delta, load_artifact, write_artifact
from credence.adapters.config import BeforeAfter, PlattMap
from credence.cli.artifact import _linear_modules
from credence.cli.main import run
from tests.cli.conftest import MODULES, RANK, WIDTH, Command, write
from tests.tiny import make_artifact, make_model


def test_inspect_for_people(tmp_path: Path, credence: Command) -> None:
    digest = write(tmp_path / "a")
    outcome = credence("inspect", tmp_path / "a")
    assert (outcome.code, outcome.err) == (0, "")
    lines = {line.split("  ")[0]: line for line in outcome.out.splitlines()}
    assert f"{digest} (verified)" in lines["digest"]
    assert "ivon" in lines["method"] and lines["kind"].endswith("diag")
    assert "tiny at abc" in lines["base model"]
    assert "4 (K=8)" in lines["tau"] and "1.3 (K=8)" in lines["temperature"]
    assert "noise at tau 4" in outcome.out
    assert "lowest 2 of 2 factors" in outcome.out
    for module in MODULES:
        assert f"{module}.lora_A" in outcome.out


def test_inspect_as_json(tmp_path: Path, credence: Command) -> None:
    digest = write(tmp_path / "a")
    outcome = credence("inspect", tmp_path / "a", "--json", "-")
    document = json.loads(outcome.out)
    assert document["digest"] == digest
    assert (document["kind"], document["method"], document["rank"], document["lora_alpha"]) == ("diag", "ivon", 2, 4.0)
    assert document["sizes"]["modules"] == 2
    assert document["sizes"]["mean_parameters"] == 2 * 2 * RANK * WIDTH
    assert document["sizes"]["posterior_parameters"] == 2 * RANK * WIDTH
    assert document["sizes"]["bytes"] == sum(
        path.stat().st_size for path in (tmp_path / "a").iterdir() if path.name != "manifest.json"
    )
    assert document["tau"]["8"]["value"] == 4.0 and document["temperature"]["8"]["value"] == 1.3
    assert document["warnings"] == [] and document["merged"] is None
    precision = document["precision"]
    assert precision["tau"] == 4.0
    assert [entry["module"] for entry in precision["factors"]] == sorted(MODULES)
    for entry in precision["factors"]:
        assert entry["sd_over_ulp"]["float16"] == pytest.approx(8 * entry["sd_over_ulp"]["bfloat16"])
    assert credence("inspect", tmp_path / "a", "--json", tmp_path / "out.json").out.startswith("kind")
    assert json.loads((tmp_path / "out.json").read_text()) == document


def test_a_classifier_is_inspected_and_drawn_with_its_head(tmp_path: Path, credence: Command) -> None:
    write(tmp_path / "a", log_sd=-10.0)  # noise that bfloat16 would not hold
    plain, head = load_artifact(tmp_path / "a"), {"classifier.weight": torch.ones(3, 4)}
    write_artifact(
        tmp_path / "c",
        adapter_config={**plain.adapter_config, "task_type": "SEQ_CLS"},
        mean=plain.mean,
        posteriors=plain.posteriors,
        config=plain.config,
        calibration=plain.calibration,
        head=head,
    )
    outcome = credence("inspect", tmp_path / "c")
    assert (outcome.code, outcome.err) == (0, "") and "12 classification head" in outcome.out
    document = json.loads(credence("inspect", tmp_path / "c", "--json", "-").out)
    assert document["sizes"]["head_parameters"] == 12
    assert "serve with" in credence("inspect", tmp_path / "a").err
    assert credence("draw", tmp_path / "c", "--k", 1, "--output", tmp_path / "s").code == 0
    written = load_file(tmp_path / "s/sample-00/adapter_model.safetensors")
    assert torch.equal(written["base_model.model.classifier.weight"], head["classifier.weight"])


def test_inspect_shows_the_maps_of_the_confidence(tmp_path: Path, credence: Command) -> None:
    scores = BeforeAfter(before=0.7, after=0.5)
    fitted = PlattMap(rows=200, correct=120, nll=scores, brier=scores, slope=2.0, intercept=1.0)
    write(tmp_path / "a", maps={0: fitted, 8: fitted})
    outcome = credence("inspect", tmp_path / "a")
    (line,) = (line for line in outcome.out.splitlines() if line.startswith("confidence map"))
    assert "platt (K=0; 120 of 200 answers right, NLL 0.700 to 0.500), platt (K=8;" in line
    document = json.loads(credence("inspect", tmp_path / "a", "--json", "-").out)
    assert document["maps"]["8"] == fitted.model_dump() and set(document["maps"]) == {"0", "8"}


def test_inspect_warns_of_noise_that_rounds_away(tmp_path: Path, credence: Command) -> None:
    write(tmp_path / "a", log_sd=-9.0, tau=1.0)
    outcome = credence("inspect", tmp_path / "a", "--json", "-")
    assert outcome.code == 0
    assert "warning: 2 of 2 factors have noise below 1 ulp of bfloat16" in outcome.err
    assert len(json.loads(outcome.out)["warnings"]) == 1


def test_inspect_warns_of_an_artifact_that_was_not_released(tmp_path: Path, credence: Command) -> None:
    write(tmp_path / "a", tau=None, temperature=None)
    outcome = credence("inspect", tmp_path / "a")
    assert "tau is not fitted" in outcome.err and "the confidence is not calibrated" in outcome.err


def test_inspect_of_a_point_adapter_has_no_noise(tmp_path: Path, credence: Command) -> None:
    write(tmp_path / "a", log_sd=None, tau=None)
    outcome = credence("inspect", tmp_path / "a")
    assert outcome.code == 0 and outcome.err == ""
    assert "noise: none" in outcome.out


def test_inspect_verifies_the_manifest(tmp_path: Path, credence: Command) -> None:
    write(tmp_path / "a")
    file = tmp_path / "a" / "posterior.json"
    file.write_bytes(file.read_bytes().replace(b"ivon", b"ivom"))
    outcome = credence("inspect", tmp_path / "a")
    assert outcome.code == 1
    assert "is not what the manifest describes" in outcome.err and outcome.err.count("\n") == 1


def test_json_into_a_folder_that_is_not_there(tmp_path: Path, credence: Command) -> None:
    write(tmp_path / "a")
    outcome = credence("inspect", tmp_path / "a", "--json", tmp_path / "no" / "x.json")
    assert outcome.code == 1
    assert (
        outcome.err == f"credence: --json {tmp_path / 'no' / 'x.json'} cannot be written: No such file or directory\n"
    )


def test_draw_writes_the_samples_the_server_serves(tmp_path: Path, credence: Command) -> None:
    digest = write(tmp_path / "a")
    outcome = credence(
        "draw", tmp_path / "a", "--k", 3, "--seed", 5, "--tau", 0.5, "--output", tmp_path / "out", "--json", "-"
    )
    assert outcome.code == 0
    names = ["sample-00", "sample-01", "sample-02"]
    assert json.loads(outcome.out) == {
        "digest": digest,
        "seed": 5,
        "tau": 0.5,
        "samples": [str(tmp_path / "out" / name) for name in names],
    }
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    artifact = load_artifact(tmp_path / "a")
    for index, name in enumerate(names):
        tensors = load_file(tmp_path / "out" / name / "adapter_model.safetensors")
        expected = artifact.draw(seed=5, index=index, tau=0.5)
        for module in MODULES:
            assert torch.equal(tensors[f"base_model.model.{module}.lora_A.weight"], expected[module].A)
        assert json.loads((tmp_path / "out" / name / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_draw_takes_seed_and_tau_from_the_artifact(tmp_path: Path, credence: Command) -> None:
    write(tmp_path / "a")
    outcome = credence("draw", tmp_path / "a", "--k", 1, "--output", tmp_path / "out")
    assert outcome.code == 0 and "seed 0, tau 4, of sha256:" in outcome.out and outcome.err == ""
    tensors = load_file(tmp_path / "out" / "sample-00" / "adapter_model.safetensors")
    expected = load_artifact(tmp_path / "a").draw(seed=0, index=0, tau=4.0)
    assert torch.equal(tensors[f"base_model.model.{MODULES[0]}.lora_A.weight"], expected[MODULES[0]].A)


def test_more_than_a_hundred_samples_sort_by_name(tmp_path: Path, credence: Command) -> None:
    write(tmp_path / "a")
    assert credence("draw", tmp_path / "a", "--k", 101, "--output", tmp_path / "out").code == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert (names[0], names[-1], len(names)) == ("sample-000", "sample-100", 101)


def test_draw_at_tau_0_says_that_samples_are_the_mean(tmp_path: Path, credence: Command) -> None:
    write(tmp_path / "a")
    outcome = credence("draw", tmp_path / "a", "--k", 2, "--tau", 0, "--output", tmp_path / "out")
    assert outcome.code == 0 and "every sample equals the mean" in outcome.err


def test_draw_refuses_an_output_that_is_not_empty(tmp_path: Path, credence: Command) -> None:
    write(tmp_path / "a")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    outcome = credence("draw", tmp_path / "a", "--k", 2, "--output", tmp_path / "out")
    assert outcome.code == 1 and "choose another folder" in outcome.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_draw_leaves_nothing_behind_when_it_fails(
    tmp_path: Path, credence: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from credence import adapters

    write(tmp_path / "a")
    whole = adapters.write_sample

    def fail_on_the_second(path: Path, artifact: adapters.Artifact, *, seed: int, index: int, tau: float) -> None:
        if index == 1:
            raise OSError(28, "No space left on device", str(path))
        whole(path, artifact, seed=seed, index=index, tau=tau)

    monkeypatch.setattr(adapters, "write_sample", fail_on_the_second)
    outcome = credence("draw", tmp_path / "a", "--k", 2, "--output", tmp_path / "out")
    assert outcome.code == 1 and "No space left on device" in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def merged(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A released adapter with noise on both factors, so small that bfloat16 would not hold it, merged in bfloat16."""
    folder = tmp_path_factory.mktemp("merged")
    make_artifact(folder / "triage", noise=1e-3, tau={8: 2.0}, temperature={8: 1.3})
    arguments = ("merge", folder / "triage", "--base", base, "--output", folder / "model", "--dtype", "bfloat16")
    assert run([str(argument) for argument in arguments]) == 0
    return folder / "model"


def test_merge_writes_a_model_and_says_what_rounding_took(base: Path, tmp_path: Path, credence: Command) -> None:
    artifact = make_artifact(tmp_path / "triage")
    outcome = credence(
        "merge", artifact.path, "--base", base, "--output", tmp_path / "out", "--dtype", "bfloat16", "--json", "-"
    )
    assert outcome.code == 0
    document = json.loads(outcome.out)
    assert f"{artifact.digest} in bfloat16, rounding took" in outcome.err
    assert f"credence serve {tmp_path / 'out'}" in outcome.err and "warning" not in outcome.err
    rounding = document.pop("rounding")
    assert 1e-4 < rounding["median"] <= rounding["max"] < 0.1
    assert document == {
        "path": str(tmp_path / "out"),
        "name": "triage",
        "dtype": "bfloat16",
        "digest": artifact.digest,
        "base_model": {"name": "tiny", "revision": None},
        "modules": 14,
        "delta_rank": 32,
        "weights": {"model.safetensors": sha256((tmp_path / "out" / "model.safetensors").read_bytes()).hexdigest()},
    }


def test_merge_into_another_base_warns(base: Path, tmp_path: Path, credence: Command) -> None:
    """Its files are links, as in a hub cache."""
    (tmp_path / "copy").mkdir()
    for path in base.iterdir():
        (tmp_path / "copy" / path.name).symlink_to(path)
    artifact = make_artifact(tmp_path / "a", form="point")
    outcome = credence(
        "merge", artifact.path, "--base", tmp_path / "copy", "--output", tmp_path / "out", "--name", "b.c-1"
    )
    assert outcome.code == 0 and "warning: the adapter was trained on 'tiny', and is merged into 'copy'" in outcome.err
    assert json.loads((tmp_path / "out" / "credence_merged.json").read_text())["name"] == "b.c-1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "Triage"], "the name 'Triage' must match"),
        (["--base", "{tmp}/none"], "is no folder and cannot be fetched from the hub"),
        (["--base", "no/such-model"], "is no folder and cannot be fetched from the hub"),
        (["--base", "{tmp}/empty"], "is not a causal language model that transformers knows"),
        (["--output", "{tmp}/empty/.."], "choose another folder"),
    ],
)
def test_merge_refuses_in_one_sentence(
    base: Path, tmp_path: Path, credence: Command, arguments: list[str], message: str
) -> None:
    artifact = make_artifact(tmp_path / "a", form="row")
    (tmp_path / "empty").mkdir()
    given = [part.format(tmp=tmp_path) for part in arguments]
    outcome = credence("merge", artifact.path, "--base", base, "--output", tmp_path / "out", *given)
    assert outcome.code == 1 and message in outcome.err and outcome.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "empty"]


def test_transposed_and_tied_layers_are_not_plain_linear_ones(tmp_path: Path) -> None:
    """GPT-2 stores its projections transposed, and lm_head shares the embedding's weight: same shapes, another meaning."""
    from transformers import GPT2Config, LlamaConfig

    GPT2Config(
        n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=32, architectures=["GPT2LMHeadModel"]
    ).save_pretrained(tmp_path / "gpt2")
    assert _linear_modules(tmp_path / "gpt2") == {}
    llama = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    LlamaConfig(**llama, tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    LlamaConfig(**llama, tie_word_embeddings=False).save_pretrained(tmp_path / "untied")
    tied, untied = _linear_modules(tmp_path / "tied"), _linear_modules(tmp_path / "untied")
    assert untied["lm_head"] == (64, 32) and untied["model.layers.0.mlp.down_proj"] == (32, 48) and len(untied) == 8
    assert set(untied) - set(tied) == {"lm_head"}


def test_inspect_of_a_merged_model(merged: Path, tmp_path: Path, credence: Command) -> None:
    outcome = credence("inspect", merged, "--json", tmp_path / "out.json")
    assert outcome.code == 0 and "28 of 28 factors have noise below 1 ulp of bfloat16" in outcome.err
    assert "its deltas hold it, bfloat16 arithmetic does not; serve with --dtype float32" in outcome.err
    assert outcome.out.startswith("merged model  triage, bfloat16 weights (verified), samples are deltas of rank 32\n")
    assert "noise at tau 2 beside the unmerged factors: lowest" in outcome.out
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["merged"] == {
        "name": "triage",
        "dtype": "bfloat16",
        "base_model": {"name": "tiny", "revision": None},
        "delta_rank": 32,
    }
    assert "most of it rounds away" in credence("inspect", merged / "credence").err, "the same artifact, not merged"
    shutil.copytree(merged, tmp_path / "changed")
    weights = tmp_path / "changed" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    outcome = credence("inspect", tmp_path / "changed")
    assert outcome.code == 1 and "is not the file `credence merge` wrote" in outcome.err


def test_draw_from_a_merged_model_writes_deltas(merged: Path, tmp_path: Path, credence: Command) -> None:
    outcome = credence("draw", merged, "--k", 2, "--seed", 5, "--output", tmp_path / "out", "--json", "-")
    artifact = load_artifact(merged / "credence")
    names = ["sample-00", "sample-01"]
    assert outcome.code == 0 and json.loads(outcome.out) == {
        "digest": artifact.digest,
        "seed": 5,
        "tau": 2.0,
        "samples": [str(tmp_path / "out" / name) for name in names],
        "layout": "delta",
    }
    for index, name in enumerate(names):
        tensors = load_file(tmp_path / "out" / name / "adapter_model.safetensors")
        expected = delta(artifact.draw(seed=5, index=index, tau=2.0), artifact.mean)
        assert len(tensors) == 2 * len(expected)
        for module, pair in expected.items():
            assert torch.equal(tensors[f"base_model.model.{module}.lora_A.weight"], pair.A)
            assert torch.equal(tensors[f"base_model.model.{module}.lora_B.weight"], pair.B)
        config = json.loads((tmp_path / "out" / name / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (32, 48)
