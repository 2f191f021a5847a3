"""`credence lm-eval`: EleutherAI's lm-evaluation-harness with the model `credence` in it."""

import sys

import typer

from credence.cli.output import needs_extra


def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness; its `--model credence` asks a running server with K posterior samples.

    Everything after `lm-eval` is the harness's own command line.

    \b
    Example:
      credence lm-eval run --model credence --tasks arc_easy --output_path out --log_samples \\
        --model_args model=triage,n_samples=8,tokenizer=BASE,uncertainty_file=out/uncertainty.jsonl
    """
    with needs_extra("lm-eval"):
        from lm_eval.__main__ import cli_evaluate

        import credence.cli.lm_eval  # noqa: F401  (registers the model)
    sys.argv = ["lm-eval", *context.args]
    cli_evaluate()
