"""The manifests of examples/kubernetes, against the schemas of their kinds, and in themselves."""

import copy
import json
from pathlib import Path

import pytest

from training.arguments import parse_arguments

jsonschema, yaml = pytest.importorskip("jsonschema"), pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parent.parent.parent
SCHEMA = json.loads((Path(__file__).parent / "kubernetes_jobs.schema.json").read_text())


def manifest(kind: str) -> dict:
    return yaml.safe_load((ROOT / f"examples/kubernetes/{kind.lower()}.yaml").read_text())


def faults(job: dict, kind: str) -> list[str]:
    validator = jsonschema.Draft202012Validator({"$ref": f"#/$defs/{kind}", "$defs": SCHEMA["$defs"]})
    return [error.message for error in validator.iter_errors(job)]


def container(job: dict, replicas: str) -> dict:
    specs = job["spec"].get("pytorchReplicaSpecs") or job["spec"]["mpiReplicaSpecs"]
    only, = specs[replicas]["template"]["spec"]["containers"]
    return only


@pytest.mark.parametrize("kind", ["PyTorchJob", "MPIJob"])
def test_a_manifest_is_one_of_its_kind(kind):
    assert faults(manifest(kind), kind) == []


@pytest.mark.parametrize("kind, path, value, fault", [
    ("PyTorchJob", "spec.nprocPerNode", 8, "8 is not of type 'string'"),
    ("PyTorchJob", "spec.elasticPolicy.maxReplica", 4, "'maxReplica' was unexpected"),
    ("PyTorchJob", "spec.pytorchReplicaSpecs", None, "'pytorchReplicaSpecs' is a required property"),
    ("PyTorchJob", "apiVersion", "kubeflow.org/v2", "'kubeflow.org/v1' was expected"),
    ("MPIJob", "spec.slotsPerWorker", "8", "'8' is not of type 'integer'"),
    ("MPIJob", "spec.mpiReplicaSpecs.Worker.restartPolicy", "Sometimes", "'Sometimes' is not one of"),
])
def test_a_wrong_manifest_is_found(kind, path, value, fault):
    job = copy.deepcopy(manifest(kind))
    *parents, last = path.split(".")
    place = job
    for parent in parents:
        place = place[parent]
    if value is None:
        del place[last]
    else:
        place[last] = value
    assert any(fault in found for found in faults(job, kind)), faults(job, kind)


def test_the_elastic_job_says_what_the_operator_gives_to_torchrun():
    """The operator wants a container of the name pytorch, and sets what torchrun's flags would."""
    job = manifest("PyTorchJob")
    worker, policy = container(job, "Worker"), job["spec"]["elasticPolicy"]
    assert worker["name"] == "pytorch" and worker["command"] == ["torchrun", "run_pretraining.py"]
    assert policy["minReplicas"] <= job["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"] <= policy["maxReplicas"]
    assert policy["maxRestarts"] > 0 and policy["rdzvBackend"] == "c10d"
    args = parse_arguments(worker["args"])
    assert args.train_batch_size * policy["maxReplicas"] * int(job["spec"]["nprocPerNode"]) == 65536
    assert all(folder.startswith("s3://") for folder in (args.input_dir, args.output_dir, args.json_summary))


def test_mpirun_starts_a_rank_for_each_card_and_passes_on_every_variable():
    job = manifest("MPIJob")
    launcher, worker = container(job, "Launcher"), container(job, "Worker")
    words = launcher["command"]
    ranks = job["spec"]["slotsPerWorker"] * job["spec"]["mpiReplicaSpecs"]["Worker"]["replicas"]
    assert int(words[words.index("-n") + 1]) == ranks
    assert words[-2:] == ["python3", "run_pretraining.py"]
    passed_on = {name for option, name in zip(words, words[1:], strict=False) if option == "-x"}
    variables = {variable["name"]: variable["value"] for variable in launcher["env"]}
    assert {*variables, "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= passed_on
    assert variables["MASTER_ADDR"] == f"{job['metadata']['name']}-worker-0.{job['metadata']['name']}"
    args = parse_arguments(launcher["args"])
    assert args.resume_from_checkpoint and args.train_batch_size * ranks == 65536
    assert launcher["workingDir"] == worker["workingDir"]


@pytest.mark.parametrize("kind", ["PyTorchJob", "MPIJob"])
def test_no_manifest_needs_a_volume_that_outlives_its_pods(kind):
    job = manifest(kind)
    specs = (job["spec"].get("pytorchReplicaSpecs") or job["spec"]["mpiReplicaSpecs"]).values()
    volumes = [volume for replicas in specs for volume in replicas["template"]["spec"].get("volumes", [])]
    assert volumes and all(volume.keys() == {"name", "emptyDir"} for volume in volumes)
