"""The examples for containers and clusters: what they start is taken by the real parser, what they name exists."""

from __future__ import annotations

import re
import shlex
import tomllib
from typing import Any

import pytest
import yaml

from tests.documents import ROOT, arguments_of, lines_of, parse
from vlm_sft import __version__

CLUSTERS = ROOT / "examples" / "clusters"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def document(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((CLUSTERS / name).read_text(encoding="utf-8"))
    return found


def trained(script: str) -> tuple[list[str], Any]:
    """The words of the launch line of a shell text, and what our parser makes of it; variables are words."""
    (line,) = [one for one in lines_of(script.replace("exec ", "")) if "vlm_sft" in one]
    line = line.rpartition("; ")[2].strip()
    words = arguments_of(line)
    assert words is not None
    return shlex.split(line), parse(words)


def flag(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


@pytest.mark.parametrize("name", ["jobset.yaml", "pytorchjob.yaml", "skypilot.yaml"])
def test_every_start_goes_on_where_the_last_one_was(name: str) -> None:
    text = document(name)
    script = text["run"] if name == "skypilot.yaml" else container(text)["args"][0]
    words, args = trained(script)
    assert args.verb == "train" and args.resume == "auto" and args.flash_attn
    if "torchrun" in words:
        assert "SIGUSR1" in flag(words, "--signals-to-handle") and "SIGTERM" in flag(words, "--signals-to-handle")


def container(text: dict[str, Any]) -> dict[str, Any]:
    if text["kind"] == "JobSet":
        pod = text["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    else:
        pod = text["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
    assert {one["name"] for one in pod["volumes"]} == {one["name"] for one in pod["containers"][0]["volumeMounts"]}
    found: dict[str, Any] = pod["containers"][0]
    return found


def test_the_job_set_starts_as_many_machines_as_torchrun_waits_for() -> None:
    text = document("jobset.yaml")
    job = text["spec"]["replicatedJobs"][0]
    spec = job["template"]["spec"]
    words, _ = trained(container(text)["args"][0])
    assert int(flag(words, "--nnodes")) == spec["parallelism"] == spec["completions"]
    assert spec["completionMode"] == "Indexed"
    # A pod is reached as JOBSET-JOB-REPLICA-INDEX.JOBSET.
    name = text["metadata"]["name"]
    assert flag(words, "--master_addr") == f"{name}-{job['name']}-0-0.{name}"
    assert int(flag(words, "--nproc_per_node")) == container(text)["resources"]["limits"]["nvidia.com/gpu"]
    assert int(flag(words, "--master_port")) == container(text)["ports"][0]["containerPort"]


def test_the_pytorch_job_hands_its_machines_to_torchrun() -> None:
    text = document("pytorchjob.yaml")
    replicas = text["spec"]["pytorchReplicaSpecs"]
    assert replicas["Worker"] == replicas["Master"] and replicas["Master"]["replicas"] == 1
    assert container(text)["name"] == "pytorch"  # the operator sets its variables in the container of this name
    script = container(text)["args"][0]
    # What the operator calls RANK is the machine: a rank that saw it would take itself for that one.
    assert script.index("unset WORLD_SIZE RANK") < script.index("torchrun")


def test_the_image_is_made_of_files_and_extras_that_exist() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE):
        assert all((ROOT / name).exists() for name in line.split()[:-1]), line
    (extras,) = re.findall(r"^ARG EXTRAS=(.+)$", text, re.MULTILINE)
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    lines = re.findall(r"docker run .*? vlm-sft (train .+)$", text, re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        assert parse(shlex.split(line)).verb == "train"


def test_the_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__ and citation["license"] == PROJECT["license"]
