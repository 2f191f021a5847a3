"""`credence inspect` and `credence draw`: what an artifact holds, and its samples as plain LoRA folders."""

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from credence.cli.output import JsonOption, needs_extra, print_table, rows, say, warn, write_json

if TYPE_CHECKING:
    from credence.adapters import Artifact, Fit
    from credence.adapters.precision import PrecisionReport

# K at which tau is looked up for the precision check: the server's default number of samples.
INSPECT_K = 8
WARN_DTYPE = "bfloat16"
SHOWN_FACTORS = 10


def inspect(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The artifact.", show_default=False)],
    json_file: JsonOption = None,
) -> None:
    """Verify an artifact and say what is in it.

    Every file is checked against the manifest. The noise is compared with the spacing (ulp) of the serving dtypes:
    below 1 ulp most samples round back to the mean.

    \b
    Example:
      credence inspect out/triage
      credence inspect out/triage --json -
    """
    with needs_extra("adapters"):
        from credence.adapters import load_artifact
        from credence.adapters.precision import check_precision
    artifact = load_artifact(directory)
    precision = check_precision(artifact, tau=artifact.config.fitted_tau(INSPECT_K))
    warnings = _warnings(artifact, precision)
    write_json(json_file, _document(directory, artifact, precision, warnings))
    if json_file != "-":
        _print(artifact, precision)
    for warning in warnings:
        warn(warning)


def draw(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The artifact.", show_default=False)],
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
    OUT appears complete or not at all.

    \b
    Example:
      credence draw out/triage --k 8 --output out/triage-samples
    """
    with needs_extra("adapters"):
        from credence.adapters import load_artifact, write_sample
        from credence.adapters.files import replacing_folder
    artifact = load_artifact(directory)
    seed = artifact.config.default_seed if seed is None else seed
    tau = artifact.config.fitted_tau(k) if tau is None else tau
    width = max(2, len(str(k - 1)))
    names = [f"sample-{index:0{width}d}" for index in range(k)]
    with replacing_folder(output, replace=False) as folder:
        for index, name in enumerate(names):
            write_sample(folder / name, artifact, seed=seed, index=index, tau=tau)
    write_json(
        json_file,
        {
            "digest": artifact.digest,
            "seed": seed,
            "tau": tau,
            "samples": [str(output / name) for name in names],
        },
    )
    say(json_file, f"wrote {output / names[0]} to {names[-1]}, seed {seed}, tau {tau:g}, of {artifact.digest}")
    if not artifact.has_posterior or tau == 0:
        warn(f"every sample equals the mean adapter: kind {artifact.config.kind}, tau {tau:g}")


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
        "default_seed": config.default_seed,
        "sizes": _sizes(artifact),
        "tau": {str(k): fit.model_dump() for k, fit in sorted(config.tau.items())},
        "temperature": {str(k): fit.model_dump() for k, fit in sorted(artifact.calibration.temperature.items())},
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
        "bytes": sum(entry.size for entry in artifact.manifest.files.values()),
    }


def _warnings(artifact: "Artifact", precision: "PrecisionReport") -> list[str]:
    found = []
    below = precision.below_one_ulp(WARN_DTYPE)
    if below:
        found.append(
            f"{len(below)} of {len(precision.factors)} factors have noise below 1 ulp of {WARN_DTYPE} "
            f"(first: {below[0]}): most of it rounds away; serve with --dtype float32, or raise tau"
        )
    if artifact.has_posterior and not artifact.config.tau:
        found.append("tau is not fitted, so it is 1; run `credence release`")
    if not artifact.calibration.temperature:
        found.append("the confidence is not calibrated; run `credence release`")
    return found


def _print(artifact: "Artifact", precision: "PrecisionReport") -> None:
    config, sizes = artifact.config, _sizes(artifact)
    revision = f" at {config.base_model.revision}" if config.base_model.revision else ""
    print(
        rows(
            {
                "kind": config.kind,
                "method": f"{config.method} (credence {config.credence_version})",
                "digest": f"{artifact.digest} (verified)",
                "base model": f"{config.base_model.name}{revision}",
                "LoRA": f"r {config.rank}, alpha {config.lora_alpha:g}, {sizes['modules']} modules of {', '.join(config.target_modules)}",
                "parameters": f"{sizes['mean_parameters']:,} mean, {sizes['posterior_parameters']:,} posterior",
                "size": f"{sizes['bytes']:,} bytes",
                "tau": _fits(config.tau),
                "temperature": _fits(artifact.calibration.temperature),
            }
        )
    )
    if not precision.factors:
        print("noise: none, every sample equals the mean")
        return
    lowest = sorted(precision.factors, key=lambda entry: entry.sd_over_ulp[WARN_DTYPE])[:SHOWN_FACTORS]
    print(
        f"\nnoise at tau {precision.tau:g}: lowest {len(lowest)} of {len(precision.factors)} factors (all with --json)"
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


def _fits(fits: "Mapping[int, Fit]") -> str:
    return ", ".join(f"{fit.value:.4g} (K={k})" for k, fit in sorted(fits.items())) or "not fitted"


def _ratio(value: float | None) -> str:
    if value is None:
        return "-"
    return "> 1e6" if value > 1e6 else f"{value:.3g}"
