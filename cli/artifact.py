"""`credence inspect`, `draw` and `merge`: what an artifact holds, its samples as plain LoRA folders, its mean inside the base model."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from credence.cli.output import CommandError, JsonOption, needs_extra, print_table, rows, say, warn, write_json

if TYPE_CHECKING:
    from credence.adapters import Artifact, Fit, MergedModel
    from credence.adapters.precision import PrecisionReport

# K at which tau is looked up for the precision check: the server's default number of samples.
INSPECT_K = 8
WARN_DTYPE = "bfloat16"
SHOWN_FACTORS = 10


def inspect(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The artifact.", show_default=False)],
    trust: Annotated[
        Path | None,
        typer.Option(
            "--trust", metavar="FILE", help="Public keys, one of which must have signed it.", show_default=False
        ),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Verify an artifact and say what is in it.

    Every file is checked against the manifest, and with --trust the manifest against its signature. Of a merged model
    the weights are verified too. The noise is compared with the spacing (ulp) of the serving dtypes: below 1 ulp most
    samples round back to the mean.

    \b
    Example:
      credence inspect out/triage
      credence inspect out/triage --json -
    """
    with needs_extra("adapters"):
        from credence.adapters import TrustRoot, is_merged, load_artifact, load_merged
        from credence.adapters.precision import check_precision
        from credence.adapters.signature import claimed_signer
    trusted = None if trust is None else TrustRoot.load(trust)
    merged = load_merged(directory, trust=trusted) if is_merged(directory) else None
    artifact = load_artifact(directory, trust=trusted) if merged is None else merged.artifact
    signed_by = artifact.signed_by if merged is None else merged.signed_by
    signature = {"key_id": signed_by or claimed_signer(directory), "verified": signed_by is not None}
    precision = check_precision(artifact, tau=artifact.config.fitted_tau(INSPECT_K))
    warnings = _warnings(artifact, precision, merged)
    document = _document(directory, artifact, precision, warnings)
    write_json(json_file, document | {"signature": signature, "merged": _merged_document(merged)})
    if json_file != "-":
        _print(artifact, precision, merged, signature)
    for warning in warnings:
        warn(warning)


def draw(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="The artifact, or a merged model.", show_default=False)
    ],
    k: Annotated[int, typer.Option("--k", min=1, help="Number of samples.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", help="New folder for the samples.", show_default=False)],
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Posterior seed.", show_default="the artifact's")
    ] = None,
    tau: Annotated[
        float | None,
        typer.Option(
            "--tau", min=0.0, help="Posterior temperature, 0 is the mean.", show_default="the fitted one for K"
        ),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Write samples as plain PEFT LoRA folders.

    They are OUT/sample-00, OUT/sample-01, ... Sample k is what the server serves as sample k under the same seed and tau.
    Of an artifact they belong on its base model; of a folder that `credence merge` wrote they are deltas, which belong on
    that folder's model. OUT appears complete or not at all.

    \b
    Example:
      credence draw out/triage --k 8 --output out/triage-samples
    """
    with needs_extra("adapters"):
        from credence.adapters import is_merged, load_artifact, load_merged, write_delta, write_sample
        from credence.adapters.files import replacing_folder
    merged = is_merged(directory)
    artifact = load_merged(directory, verify_weights=False).artifact if merged else load_artifact(directory)
    write = write_delta if merged else write_sample
    seed = artifact.config.default_seed if seed is None else seed
    tau = artifact.config.fitted_tau(k) if tau is None else tau
    width = max(2, len(str(k - 1)))
    names = [f"sample-{index:0{width}d}" for index in range(k)]
    with replacing_folder(output, replace=False) as folder:
        for index, name in enumerate(names):
            write(folder / name, artifact, seed=seed, index=index, tau=tau)
    write_json(
        json_file,
        {
            "digest": artifact.digest,
            "seed": seed,
            "tau": tau,
            "samples": [str(output / name) for name in names],
            **({"layout": "delta"} if merged else {}),
        },
    )
    say(json_file, f"wrote {output / names[0]} to {names[-1]}, seed {seed}, tau {tau:g}, of {artifact.digest}")
    distinct = artifact.num_distinct_samples
    if not artifact.has_posterior or tau == 0:
        warn(f"every sample equals the mean adapter: kind {artifact.config.kind}, tau {tau:g}")
    elif distinct is not None and k > distinct:
        warn(f"the samples repeat after {distinct}: the ensemble has so many members, and they have no posterior")


def merge(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The artifact.", show_default=False)],
    base: Annotated[str, typer.Option("--base", help="Its base model: a folder or hub id.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", help="New folder for the merged model.", show_default=False)],
    dtype: Annotated[
        Literal["bfloat16", "float32"] | None,
        typer.Option("--dtype", help="Dtype of the weights.", show_default="the base's"),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Name it is served under.", show_default="the last part of DIR")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Write base model and mean as one model, with the posterior beside it.

    OUT is a complete model folder that any engine loads. `credence serve OUT` serves its mean without LoRA and its samples
    as delta adapters, whose numbers hold the noise apart from the mean. OUT appears complete or not at all.

    \b
    Example:
      credence merge out/triage --base meta-llama/Llama-3.2-1B --output out/triage-merged
    """
    with needs_extra("train"):
        from credence.adapters import BaseModelRef, load_artifact
        from credence.adapters import merge as merge_model
        from credence.adapters.merged import MODEL_NAME
    name = directory.resolve().name if name is None else name
    if not MODEL_NAME.fullmatch(name):
        raise CommandError(f"the name {name!r} must match {MODEL_NAME.pattern}; give another one with --name")
    trained_on = load_artifact(directory).config.base_model
    is_folder = Path(base).is_dir()
    reference = BaseModelRef(
        name=Path(base).resolve().name if is_folder else base,
        revision=trained_on.revision if base == trained_on.name and not is_folder else None,
    )
    folder = Path(base) if is_folder else _fetch(base, reference.revision)
    report = merge_model(
        directory, folder, output, linear_modules=_linear_modules(folder), base_model=reference, name=name, dtype=dtype
    )
    if reference.name.rpartition("/")[2] != trained_on.name.rpartition("/")[2]:
        warn(f"the adapter was trained on {trained_on.name!r}, and is merged into {reference.name!r}")
    model, rounding = report.model, sorted(report.rounding.values())
    write_json(
        json_file,
        {
            "path": str(output),
            "name": model.name,
            "dtype": model.dtype,
            "digest": model.artifact.digest,
            "base_model": reference.model_dump(),
            "modules": len(model.artifact.mean),
            "delta_rank": model.rank,
            "rounding": {"median": median(rounding) if rounding else None, "max": rounding[-1] if rounding else None},
            "weights": {file: entry.sha256 for file, entry in model.manifest.weights.items()},
        },
    )
    lost = f", rounding took {median(rounding):.2g} of the mean's update (median module)" if rounding else ""
    say(
        json_file,
        f"wrote {output}: {reference.name} with {len(model.artifact.mean)} modules of {model.artifact.digest} in {model.dtype}{lost}; "
        f"serve it with `credence serve {output}`",
    )


def _fetch(base: str, revision: str | None) -> Path:
    """Folder of a hub id's files, fetched or taken from the local cache."""
    with needs_extra("train"):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*"]
    try:
        return Path(snapshot_download(base, revision=revision, allow_patterns=patterns))
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CommandError(f"--base {base} is no folder and cannot be fetched from the hub: {reason}") from error


def _linear_modules(base: Path) -> dict[str, tuple[int, ...]]:
    """Shapes [n_out, n_in] of the plain linear layers of a causal language model whose weights no other module shares.

    The model is built without weights, and without code from its folder.
    """
    with needs_extra("train"):
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(str(base), trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CommandError(f"--base {base} is not a causal language model that transformers knows: {reason}") from error
    modules = dict(model.named_modules(remove_duplicate=False))
    owners = Counter(id(module.weight) for module in modules.values() if getattr(module, "weight", None) is not None)
    return {
        name: tuple(module.weight.shape)
        for name, module in modules.items()
        if type(module) is torch.nn.Linear and owners[id(module.weight)] == 1
    }


def _merged_document(merged: "MergedModel | None") -> dict[str, Any] | None:
    if merged is None:
        return None
    return {
        "name": merged.name,
        "dtype": merged.dtype,
        "base_model": merged.manifest.base_model.model_dump(),
        "delta_rank": merged.rank,
    }


def _document(
    directory: Path, artifact: "Artifact", precision: "PrecisionReport", warnings: list[str]
) -> dict[str, Any]:
    config = artifact.config
    return {
        "path": str(directory),
        "digest": artifact.digest,
        "kind": config.kind,
        "method": config.method,
        "credence_version": config.credence_version,
        "base_model": config.base_model.model_dump(),
        "rank": config.rank,
        "lora_alpha": config.lora_alpha,
        "target_modules": list(config.target_modules),
        "settings": config.settings,
        "member": config.member.model_dump() if config.member else None,
        "num_distinct_samples": artifact.num_distinct_samples,
        "default_seed": config.default_seed,
        "sizes": _sizes(artifact),
        "tau": {str(k): fit.model_dump() for k, fit in sorted(config.tau.items())},
        "temperature": {str(k): fit.model_dump() for k, fit in sorted(artifact.calibration.temperature.items())},
        "maps": {str(k): found.model_dump() for k, found in sorted(artifact.calibration.maps.items())},
        "precision": {
            "tau": precision.tau,
            "factors": [
                {
                    "module": entry.module,
                    "factor": entry.factor,
                    "sd_over_ulp": dict(entry.sd_over_ulp),
                    "sd_over_rms": entry.sd_over_rms,
                }
                for entry in precision.factors
            ],
        },
        "metrics": artifact.metrics,
        "warnings": warnings,
    }


def _sizes(artifact: "Artifact") -> dict[str, int]:
    return {
        "modules": len(artifact.mean),
        "mean_parameters": sum(pair.A.numel() + pair.B.numel() for pair in artifact.mean.values()),
        "posterior_parameters": sum(
            tensor.numel() for posterior in artifact.posteriors.values() for tensor in posterior.tensors().values()
        ),
        "head_parameters": sum(tensor.numel() for tensor in artifact.head.values()),
        "bytes": sum(entry.size for entry in artifact.manifest.files.values()),
    }


def _warnings(artifact: "Artifact", precision: "PrecisionReport", merged: "MergedModel | None") -> list[str]:
    found = []
    below = precision.below_one_ulp(WARN_DTYPE)
    # Deltas hold such noise, but bfloat16 arithmetic then rounds it away (benchmarks/results/merged_precision.md).
    where = "most of it rounds away" if merged is None else "its deltas hold it, bfloat16 arithmetic does not"
    if below and not artifact.head:  # classifiers are not served, and evaluated in float32 unless trained otherwise
        found.append(
            f"{len(below)} of {len(precision.factors)} factors have noise below 1 ulp of {WARN_DTYPE} "
            f"(first: {below[0]}): {where}; serve with --dtype float32, or raise tau"
        )
    if artifact.has_posterior and not artifact.config.tau:
        found.append("tau is not fitted, so it is 1; run `credence release`")
    if not artifact.calibration.temperature:
        found.append("the confidence is not calibrated; run `credence release`")
    return found


def _print(
    artifact: "Artifact",
    precision: "PrecisionReport",
    merged: "MergedModel | None",
    signature: Mapping[str, str | bool | None],
) -> None:
    config, sizes = artifact.config, _sizes(artifact)
    model = {}
    if merged is not None:
        model["merged model"] = (
            f"{merged.name}, {merged.dtype} weights (verified), samples are deltas of rank {merged.rank}"
        )
    revision = f" at {config.base_model.revision}" if config.base_model.revision else ""
    head = f", {sizes['head_parameters']:,} classification head" if artifact.head else ""
    print(
        rows(
            {
                **model,
                "kind": _kind(artifact),
                "method": f"{config.method} (credence {config.credence_version})",
                "digest": f"{artifact.digest} (verified)",
                "signature": _signature(signature),
                "base model": f"{config.base_model.name}{revision}",
                "LoRA": f"r {config.rank}, alpha {config.lora_alpha:g}, {sizes['modules']} modules of {', '.join(config.target_modules)}",
                "parameters": f"{sizes['mean_parameters']:,} mean, {sizes['posterior_parameters']:,} posterior{head}",
                "size": f"{sizes['bytes']:,} bytes",
                "tau": _fits(config.tau),
                "temperature": _fits(artifact.calibration.temperature),
                **_maps(artifact),
            }
        )
    )
    if not precision.factors:
        print("noise: none, every sample equals the mean")
        return
    lowest = sorted(precision.factors, key=lambda entry: entry.sd_over_ulp[WARN_DTYPE])[:SHOWN_FACTORS]
    print(
        f"\nnoise at tau {precision.tau:g}{'' if merged is None else ' beside the unmerged factors'}: "
        f"lowest {len(lowest)} of {len(precision.factors)} factors (all with --json)"
    )
    dtypes = list(lowest[0].sd_over_ulp)
    relative = [entry.sd_over_rms for entry in precision.factors if entry.sd_over_rms is not None]
    print_table(
        ["factor", *(f"sd/ulp {dtype}" for dtype in dtypes), "sd/rms(w)"],
        [
            [
                f"{entry.module}.lora_{entry.factor}",
                *(_ratio(entry.sd_over_ulp[dtype]) for dtype in dtypes),
                _ratio(entry.sd_over_rms),
            ]
            for entry in lowest
        ],
        footer=[
            "median of all",
            *(_ratio(precision.median_sd_over_ulp(dtype)) for dtype in dtypes),
            _ratio(median(relative) if relative else None),
        ],
    )


def _signature(signature: Mapping[str, str | bool | None]) -> str:
    if signature["key_id"] is None:
        return "none"
    return f"by the key {signature['key_id']} ({'verified' if signature['verified'] else 'not checked: give --trust FILE'})"


def _kind(artifact: "Artifact") -> str:
    config = artifact.config
    if config.kind != "ensemble":
        return config.kind
    members = len(next(iter(artifact.posteriors.values())).members)  # type: ignore[attr-defined]
    own = f", each with a posterior of kind {config.member.kind}" if config.member else ""
    return (
        f"ensemble of {members}{own}; the mean adapter is the {config.mean}{' mean' if config.mean == 'exact' else ''}"
    )


def _maps(artifact: "Artifact") -> dict[str, str]:
    maps = sorted(artifact.calibration.maps.items())
    shown = [
        f"{found.kind} (K={k}; {found.correct} of {found.rows} answers right, NLL {found.nll.before:.3f} to {found.nll.after:.3f})"
        for k, found in maps
    ]
    return {"confidence map": ", ".join(shown)} if shown else {}


def _fits(fits: "Mapping[int, Fit]") -> str:
    return ", ".join(f"{fit.value:.4g} (K={k})" for k, fit in sorted(fits.items())) or "not fitted"


def _ratio(value: float | None) -> str:
    if value is None:
        return "-"
    return "> 1e6" if value > 1e6 else f"{value:.3g}"
