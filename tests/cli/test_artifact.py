import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from credence.adapters import load_artifact
from tests.cli.conftest import MODULES, RANK, WIDTH, Command, write


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
    assert document["warnings"] == []
    precision = document["precision"]
    assert precision["tau"] == 4.0
    assert [entry["module"] for entry in precision["factors"]] == sorted(MODULES)
    for entry in precision["factors"]:
        assert entry["sd_over_ulp"]["float16"] == pytest.approx(8 * entry["sd_over_ulp"]["bfloat16"])
    assert credence("inspect", tmp_path / "a", "--json", tmp_path / "out.json").out.startswith("kind")
    assert json.loads((tmp_path / "out.json").read_text()) == document


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
