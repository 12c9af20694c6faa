"""The files of docs/launch: what each task would be started with, and that their parts agree.

No cluster is needed: programs of Slurm, Dask and the toolkit are stood in for by small ones that
note what they were started with.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import build_mtt
import train
from toolkit.training.hosts import ADDRESSES, NUM_PROCESSES, PROCESS_ID

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "docs/launch"
HOSTS = ["node3", "node4", "node7"]
FAKES = {
    # Starts a task a host, kills them on SIGTERM, and ends with the highest status.
    "srun": """
        while arguments and arguments[0].startswith("--"):
            options.append(arguments.pop(0))
        note("srun", options=options)
        tasks = [
            subprocess.Popen(arguments, env=os.environ | {"SLURM_PROCID": str(task)})
            for task in range(int(os.environ["SLURM_JOB_NUM_NODES"]))
        ]
        note("tasks", pids=[task.pid for task in tasks])
        signal.signal(signal.SIGTERM, lambda *_: [task.kill() for task in tasks])
        sys.exit(max(task.wait() for task in tasks))
    """,
    # Sends a signal to the tasks of a step.
    "scancel": """
        assert arguments == ["--signal=TERM", os.environ["SLURM_JOB_ID"] + ".0"], arguments
        with open(os.path.join(os.environ["FAKE_NOTES"], "tasks.json")) as file:
            for pid in json.load(file)["pids"]:
                os.kill(pid, signal.SIGTERM)
    """,
    "scontrol": """
        if arguments[:2] == ["show", "hostnames"]:
            print("\\n".join(os.environ["FAKE_HOSTS"].split()))
        else:
            note("scontrol", arguments=arguments)
    """,
    # As train.py on SIGTERM.
    "python": """
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        note("python" + os.environ.get("SLURM_PROCID", ""), arguments=arguments,
             environment=dict(os.environ))
        time.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
        statuses = os.environ.get("FAKE_STATUS", "0").split()
        sys.exit(int(statuses[int(os.environ.get("SLURM_PROCID", "0")) % len(statuses)]))
    """,
    "dask": """
        note("dask_" + arguments[0] + os.environ.get("SLURM_PROCID", ""), arguments=arguments)
        if arguments[0] == "scheduler":
            if os.environ.get("FAKE_NO_SCHEDULER"):
                sys.exit(1)
            port = int(arguments[arguments.index("--port") + 1])
            listener = socket.create_server(("127.0.0.1", port))
        time.sleep(60)
    """,
}
HEAD = """#!{python}
import json, os, signal, socket, subprocess, sys, time
arguments, options = sys.argv[1:], []
def note(name, **what):
    path = os.path.join(os.environ["FAKE_NOTES"], name + ".json")
    with open(path + ".part", "w") as file:
        json.dump(what | {{"pid": os.getpid()}}, file)
    os.replace(path + ".part", path)
"""


@pytest.fixture
def cluster(tmp_path):
    """Give the environment of a Slurm job whose programs are stood in for, and its notes."""
    programs, notes = tmp_path / "bin", tmp_path / "notes"
    programs.mkdir()
    notes.mkdir()
    for name, text in FAKES.items():
        lines = [line.removeprefix(" " * 8) for line in text.splitlines()]
        (programs / name).write_text(HEAD.format(python=sys.executable) + "\n".join(lines) + "\n")
        (programs / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "FAKE_NOTES": str(notes),
        "FAKE_HOSTS": " ".join(HOSTS),
        "SLURM_JOB_ID": "12345",
        "SLURM_JOB_NODELIST": "node[3-4,7]",
        "SLURM_JOB_NUM_NODES": str(len(HOSTS)),
        "SLURM_CPUS_PER_TASK": "6",
    }
    return environment, notes


def launch(script: str, environment: dict, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(LAUNCH / script), *arguments], env=environment, capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip


def noted(notes: Path, name: str) -> dict:
    return json.loads((notes / f"{name}.json").read_text())


def wait_for(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def directives(script: str) -> dict[str, str]:
    """Read a script's #SBATCH lines."""
    lines = re.findall(r"^#SBATCH --(\S+?)(?:=(\S+))?$", (LAUNCH / script).read_text(), re.M)
    return dict(lines)


# --- Slurm ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["train.sbatch", "build.sbatch"])
def test_scripts_are_sound_bash(script):
    done = subprocess.run(["bash", "-n", str(LAUNCH / script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert directives(script)["ntasks-per-node"] == "1"


def test_each_host_trains_as_one_process_of_the_same_job(cluster):
    environment, notes = cluster
    done = launch(
        "train.sbatch", environment | {"DATA_DIR": "/shared/my data", "BATCH_SIZE": "96"},
        "--block", "rese",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    addresses = set()
    for process in range(len(HOSTS)):
        task = noted(notes, f"python{process}")
        seen = task["environment"]
        assert seen["KERAS_BACKEND"] == "jax"
        assert seen[PROCESS_ID] == str(process)
        assert seen[NUM_PROCESSES] == str(len(HOSTS))
        addresses.add(seen[ADDRESSES])
        assert task["arguments"][0] == "train.py"
        parsed = train.build_parser().parse_args(task["arguments"][1:])
        assert parsed.distribute
        assert parsed.data_dir == "/shared/my data"
        assert (parsed.batch_size, parsed.block) == (96, "rese")
    (its_addresses,) = addresses
    hosts, ports = zip(*(address.split(":") for address in its_addresses.split(",")), strict=True)
    assert list(hosts) == HOSTS
    assert len(set(ports)) == 1
    assert 1024 < int(ports[0]) < 32768  # below those that systems hand out
    assert {"--distribution=block", "--cpus-per-task=6"} <= set(noted(notes, "srun")["options"])
    assert not (notes / "scontrol.json").exists()


@pytest.mark.parametrize("status", ["2 2 2", "143 143 143", "130 130 130"])
def test_what_cannot_work_or_was_asked_to_end_is_not_queued_again(cluster, status):
    environment, notes = cluster
    done = launch("train.sbatch", environment | {"FAKE_STATUS": status})
    assert done.returncode == int(status.split()[0])
    assert not (notes / "scontrol.json").exists()


@pytest.mark.parametrize("status", ["1 1 1", "1 137 1", "134 1 1"])
def test_after_a_lost_host_the_set_is_queued_again(cluster, status):
    environment, notes = cluster
    done = launch("train.sbatch", environment | {"FAKE_STATUS": status})
    assert noted(notes, "scontrol")["arguments"] == ["requeue", "12345"]
    assert "queued again" in done.stderr


def test_it_is_not_queued_for_ever(cluster):
    environment, notes = cluster
    done = launch(
        "train.sbatch",
        environment | {"FAKE_STATUS": "1", "SLURM_RESTART_COUNT": "4", "MAX_RESTARTS": "4"},
    )
    assert done.returncode == 1
    assert "after 4 restarts" in done.stderr
    assert not (notes / "scontrol.json").exists()


def test_when_the_time_is_up_training_ends_in_order_and_is_queued_again(cluster):
    environment, notes = cluster
    script = subprocess.Popen(
        ["bash", str(LAUNCH / "train.sbatch")],
        env=environment | {"FAKE_SECONDS": "60"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(lambda: len(list(notes.glob("python*.json"))) == len(HOSTS))
    name, _, _ = directives("train.sbatch")["signal"].removeprefix("B:").partition("@")
    script.send_signal(getattr(signal, f"SIG{name}"))
    _, said = script.communicate(timeout=30)
    assert "status 143, queued again" in said
    assert noted(notes, "scontrol")["arguments"] == ["requeue", "12345"]


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return str(listener.getsockname()[1])


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("status", [0, 1])
def test_a_build_has_a_scheduler_and_a_worker_a_core_on_each_host(cluster, status):
    environment, notes = cluster
    port = free_port()
    done = launch(
        "build.sbatch",
        environment | {
            "FAKE_HOSTS": "localhost node4 node7", "PORT": port, "DATA_DIR": "/shared/mine",
            "FAKE_STATUS": str(status), "FAKE_SECONDS": "1",
        },
        "--encoding", "int16",
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    address = f"tcp://localhost:{port}"
    scheduler = noted(notes, "dask_scheduler")
    assert scheduler["arguments"][:5] == ["scheduler", "--host", "localhost", "--port", port]
    wait_for(lambda: len(list(notes.glob("dask_worker*.json"))) == len(HOSTS))
    assert "--cpus-per-task=6" in noted(notes, "srun")["options"]
    for process in range(len(HOSTS)):
        worker = noted(notes, f"dask_worker{process}")["arguments"]
        assert worker[:2] == ["worker", address]
        assert worker[worker.index("--nworkers") + 1] == environment["SLURM_CPUS_PER_TASK"]
        assert worker[worker.index("--nthreads") + 1] == "1"
    arguments = noted(notes, "python")["arguments"]
    assert arguments[0] == "build_mtt.py"
    parsed = build_mtt.build_parser().parse_args(arguments[1:])
    assert (parsed.data_dir, parsed.scheduler, parsed.encoding) == (
        "/shared/mine",
        address,
        "int16",
    )
    wait_for(
        lambda: not any(is_running(noted(notes, path.stem)["pid"]) for path in notes.iterdir())
    )


def test_a_scheduler_that_does_not_start_is_said(cluster):
    environment, notes = cluster
    done = launch(
        "build.sbatch",
        environment | {"FAKE_HOSTS": "localhost", "PORT": free_port(), "FAKE_NO_SCHEDULER": "1"},
    )
    assert done.returncode == 1
    assert "no scheduler at tcp://localhost:" in done.stderr
    assert not (notes / "python.json").exists()


def use_real_programs(environment: dict, *names: str) -> None:
    """Put the real Python, or Dask, in the place of those that stand in for them."""
    for name in names:
        program = Path(environment["PATH"].split(":")[0]) / name
        module = "-m dask " if name == "dask" else ""
        program.write_text(f'#!/bin/bash\nexec {sys.executable} {module}"$@"\n')


@pytest.mark.slow
def test_the_script_trains_two_real_processes_on_this_machine(cluster, tiny_dataset, tmp_path):
    pytest.importorskip("jax")
    environment, _ = cluster
    use_real_programs(environment, "python")
    done = subprocess.run(
        ["bash", str(LAUNCH / "train.sbatch"), "--init-features", "2", "--max-epochs", "1",
         "--num-lr-decays", "1"],
        env=environment | {
            "FAKE_HOSTS": "localhost localhost", "SLURM_JOB_NUM_NODES": "2", "BATCH_SIZE": "4",
            "DATA_DIR": str(tiny_dataset), "TRAIN_DIR": str(tmp_path / "log"),
            "CUDA_VISIBLE_DEVICES": "", "SLURM_JOB_ID": free_port(),
        },
        capture_output=True, text=True, timeout=300, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("stage 0 epoch 0:") == 1  # the first process alone talks
    assert (tmp_path / "log/0/resume.keras").exists()


@pytest.mark.slow
def test_a_build_with_real_dask_makes_the_shards_of_a_build_alone(cluster, tiny_dataset, tmp_path):
    pytest.importorskip("distributed")
    environment, _ = cluster
    use_real_programs(environment, "dask", "python")
    for folder in ("alone", "together"):
        (tmp_path / folder).mkdir()
        for name in ("annotations_final.csv", "mp3"):
            (tmp_path / folder / name).symlink_to(tiny_dataset / name)
    done = subprocess.run(
        ["bash", str(LAUNCH / "build.sbatch"), "--num-audios-per-shard", "4"],
        env=environment | {
            "FAKE_HOSTS": "localhost", "SLURM_JOB_NUM_NODES": "1", "SLURM_CPUS_PER_TASK": "2",
            "PORT": free_port(), "DATA_DIR": str(tmp_path / "together"),
        },
        capture_output=True, text=True, timeout=120, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    build_mtt.build(tmp_path / "alone", num_audios_per_shard=4, num_workers=1)
    shards = {
        folder: {
            path.name: path.read_bytes() for path in (tmp_path / folder).glob("tfrecord/*.tfrecord")
        }
        for folder in ("alone", "together")
    }
    assert shards["alone"]
    assert shards["together"] == shards["alone"]


# --- Kubernetes ----------------------------------------------------------------------------------


def read_manifests(name: str) -> dict[tuple[str, str], dict]:
    yaml = pytest.importorskip("yaml")
    documents = yaml.safe_load_all((LAUNCH / name).read_text())
    return {(its["kind"], its["metadata"]["name"]): its for its in documents}


def pod_of(manifest: dict) -> dict:
    return manifest["spec"]["template"]["spec"]


def test_every_host_of_a_training_job_is_named_once():
    found = read_manifests("train.yaml")
    service, job = found["Service", "train"], found["Job", "train"]
    spec, pod = job["spec"], pod_of(job)
    (container,) = pod["containers"]
    environment = {its["name"]: its for its in container["env"]}
    number = spec["completions"]
    assert spec["completionMode"] == "Indexed"
    assert spec["parallelism"] == number
    assert environment[NUM_PROCESSES]["value"] == str(number)
    assert environment["KERAS_BACKEND"]["value"] == "jax"
    # An indexed job names its pods' hosts by its own name and the index.
    port = container["ports"][0]["containerPort"]
    name, subdomain = job["metadata"]["name"], pod["subdomain"]
    expected = [f"{name}-{index}.{subdomain}:{port}" for index in range(number)]
    assert environment[ADDRESSES]["value"].split(",") == expected
    index = environment[PROCESS_ID]["valueFrom"]["fieldRef"]["fieldPath"]
    assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    # The Service gives the names: headless, of the subdomain's name, for these pods.
    assert service["metadata"]["name"] == subdomain
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"]
    assert service["spec"]["selector"].items() <= spec["template"]["metadata"]["labels"].items()
    assert service["spec"]["ports"][0]["port"] == port


def test_a_lost_host_restarts_the_others_and_its_place_is_given_up_after_they_ended():
    job = read_manifests("train.yaml")["Job", "train"]
    pod = pod_of(job)
    assert pod["restartPolicy"] == "OnFailure"
    assert job["spec"]["backoffLimit"] >= 2 * job["spec"]["completions"]
    for toleration in pod["tolerations"]:
        assert 60 <= toleration["tolerationSeconds"] < 300


def test_commands_of_the_pods_parse_and_batches_are_shared_out_evenly():
    job = read_manifests("train.yaml")["Job", "train"]
    (container,) = pod_of(job)["containers"]
    assert container["command"][:2] == ["python", "train.py"]
    parsed = train.build_parser().parse_args(container["command"][2:])
    assert parsed.distribute
    gpus = container["resources"]["limits"]["nvidia.com/gpu"] * job["spec"]["completions"]
    assert parsed.batch_size % gpus == 0
    check_folders(pod_of(job), parsed.data_dir, parsed.train_dir)

    builds = read_manifests("build.yaml")
    pod = pod_of(builds["Job", "build"])
    (container,) = pod["containers"]
    assert container["command"][:2] == ["python", "build_mtt.py"]
    parsed = build_mtt.build_parser().parse_args(container["command"][2:])
    check_folders(pod, parsed.data_dir)
    service = builds["Service", "dask-scheduler"]
    port = service["spec"]["ports"][0]["port"]
    assert parsed.scheduler == f"tcp://{service['metadata']['name']}:{port}"


def check_folders(pod: dict, *folders: str) -> None:
    """Every folder lies on a volume that outlives the pod."""
    (container,) = pod["containers"]
    mounts = {its["name"]: its["mountPath"] for its in container["volumeMounts"]}
    shared = [mounts[its["name"]] for its in pod["volumes"] if "persistentVolumeClaim" in its]
    for folder in folders:
        assert any(folder.startswith(f"{path}/") for path in shared)


def test_workers_find_the_scheduler_and_take_a_core_each():
    builds = read_manifests("build.yaml")
    scheduler, workers = builds["Deployment", "dask-scheduler"], builds["Deployment", "dask-worker"]
    service = builds["Service", "dask-scheduler"]
    labels = scheduler["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    assert scheduler["spec"]["replicas"] == 1
    port = str(service["spec"]["ports"][0]["port"])
    command = pod_of(scheduler)["containers"][0]["command"]
    assert command[:2] == ["dask", "scheduler"]
    assert command[command.index("--port") + 1] == port
    (worker,) = pod_of(workers)["containers"]
    command = worker["command"]
    assert command[:3] == ["dask", "worker", f"tcp://dask-scheduler:{port}"]
    assert command[command.index("--nworkers") + 1] == worker["resources"]["requests"]["cpu"]
    assert command[command.index("--nthreads") + 1] == "1"
    for deployment in (scheduler, workers):
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()
    # Workers see the folders where the build sees them.
    assert worker["volumeMounts"] == pod_of(builds["Job", "build"])["containers"][0]["volumeMounts"]


def test_all_pods_run_one_image_whose_jax_is_the_tested_one():
    images = {
        container["image"]
        for name in ("train.yaml", "build.yaml")
        for manifest in read_manifests(name).values()
        if manifest["kind"] != "Service"
        for container in pod_of(manifest)["containers"]
    }
    dockerfile = (LAUNCH / "Dockerfile").read_text()
    (image,) = images
    assert f"--tag {image}" in dockerfile
    pinned = re.search(r"^jax(==\S+)", (ROOT / "requirements/backends.txt").read_text(), re.M)[1]
    assert f'"jax[cuda13]{pinned}"' in dockerfile
    for path in re.findall(r"-r (\S+)", dockerfile):
        assert (ROOT / path).exists()


def test_slurms_defaults_share_batches_out_evenly():
    its = directives("train.sbatch")
    text = (LAUNCH / "train.sbatch").read_text()
    batch_size = int(re.search(r"BATCH_SIZE:-(\d+)", text)[1])
    assert batch_size % (int(its["nodes"]) * int(its["gpus-per-node"])) == 0
    assert "requeue" in its
    assert "requeue" in directives("build.sbatch")
