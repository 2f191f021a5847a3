"""`credence openapi`: the OpenAPI document of the server."""

import json

from credence.cli.output import needs_extra


def openapi() -> None:
    """Print the OpenAPI document of what `credence serve` answers.

    \b
    Example:
      credence openapi > openapi.json
    """
    with needs_extra("serve"):
        from credence.serve.vllm_plugin.openapi import document
    print(json.dumps(document(), indent=1, ensure_ascii=False))
