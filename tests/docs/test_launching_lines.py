"""Lines that start ranks on several machines are lines that torchrun takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

PAGE = (Path(__file__).parents[2] / "docs/guides/machines.md").read_text()
LINES = re.findall(r"(?:^|srun )(torchrun (?:.*\\\n)*.*)", PAGE, re.MULTILINE)
MANIFEST = list(yaml.safe_load_all(re.findall(r"```\n(apiVersion.*?)```", PAGE, re.DOTALL)[0]))
COMMAND = MANIFEST[1]["spec"]["template"]["spec"]["containers"][0]["command"]


@pytest.mark.parametrize(
    "words", [*(shlex.split(line.replace("\\\n", "")) for line in LINES), COMMAND], ids=["plain", "SLURM", "Kubernetes"]
)
def test_torchrun_takes_it(words: list[str]) -> None:
    assert words[0] == "torchrun"
    args = get_args_parser().parse_args(words[1:])
    assert args.module and args.training_script == "scrimp"
    assert args.training_script_args == ["train", "recipe.yaml"]
    assert args.rdzv_backend == "c10d" and args.rdzv_endpoint.endswith(":29500") and args.rdzv_id
    assert args.max_restarts == 3 and args.nproc_per_node == "8"


def test_pods_find_the_first_one() -> None:
    service, job = MANIFEST
    spec = job["spec"]["template"]["spec"]
    assert job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(COMMAND[COMMAND.index("--nnodes") + 1])
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert COMMAND[COMMAND.index("--rdzv-endpoint") + 1] == f"{job['metadata']['name']}-0.{spec['subdomain']}:29500"
    assert spec["subdomain"] == service["metadata"]["name"]
