"""The launch files, carried out with what they call replaced by programs that say how."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.run
import yaml
from commands import LIMIT, REPOSITORY, TINY

from moco_scale.__main__ import main as moco_scale_main
from moco_scale.config import command_line
from moco_scale.config.schema import Config
from moco_scale.distributed import launchers

SCRIPTS = REPOSITORY / "scripts"
SHELL = [
    *(SCRIPTS / name for name in ("environment.sh", "slurm.sbatch", "torchrun_elastic.sh")),
    *(SCRIPTS / name for name in ("deepspeed_hostfile.sh", "two_terminals.sh")),
    REPOSITORY / ".ci" / "run",
]
WATCHED = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ENV_FILE"),
    *("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS"),
)

# Says in a file, a line for each call, how it was called; ends with the statuses it is told to.
RECORDER = """\
#!{python}
import json, os, sys
folder = {folder!r}
said = {{name: os.environ.get(name) for name in {watched!r}}}
slurm = {{k: v for k, v in os.environ.items() if k.startswith("SLURM_")}}
given = os.environ.get("DS_ENV_FILE")
call = {{"name": {name!r}, "argv": sys.argv[1:], "env": said, "slurm": slurm, "cwd": os.getcwd()}}
call["file"] = open(given).read() if given else ""
with open(folder + "/calls", "a") as file:
    file.write(json.dumps(call) + "\\n")
statuses = {statuses!r}
done = sum(json.loads(line)["name"] == {name!r} for line in open(folder + "/calls"))
sys.exit(statuses[min(done, len(statuses)) - 1])
"""

# Two tasks on each of two nodes, or as many as there are, with the variables of the real one.
SRUN = """\
#!/usr/bin/env bash
while [ "${1#--}" != "$1" ]; do echo "$1" >> "$CALLS/srun"; shift; done
per_node=$((SLURM_NTASKS / SLURM_NNODES))
export SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=$SLURM_NTASKS SLURM_STEP_NODELIST=$SLURM_JOB_NODELIST
export SLURM_STEP_TASKS_PER_NODE="$per_node(x$SLURM_NNODES)"
for ((task = 0; task < SLURM_NTASKS; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$((task % per_node)) SLURM_NODEID=$((task / per_node)) "$@" &
    tasks[task]=$!
done
worst=0
for task in "${tasks[@]}"; do
    status=0
    wait "$task" || status=$?
    [ "$status" -le "$worst" ] || worst=$status
done
exit "$worst"
"""


class Stage:
    """A folder with programs that only say how they were called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.programs = folder / "bin"
        self.programs.mkdir()

    def program(self, name: str, *statuses: int, text: str = "") -> Path:
        """A program; it ends with these statuses, one after another, then with the last."""
        path = self.programs / name
        path.write_text(
            text
            or RECORDER.format(
                python=sys.executable,
                folder=str(self.folder),
                name=name,
                watched=WATCHED,
                statuses=statuses or (0,),
            )
        )
        path.chmod(0o755)
        return path

    def run(self, script: str, *arguments: object, **variables: object) -> int:
        """A script's status; it finds the programs before all others."""
        outside = (*WATCHED, "SLURM", "LOCAL", "NCCL", "GLOO", "OMP", "PET_")
        env = {k: v for k, v in os.environ.items() if not k.startswith(outside)}
        env |= {"PATH": f"{self.programs}:{env['PATH']}", "CALLS": str(self.folder)}
        env |= {name: str(value) for name, value in variables.items()}
        command = ["bash", str(SCRIPTS / script), *(str(part) for part in arguments)]
        return subprocess.run(command, env=env, cwd=self.folder, timeout=LIMIT).returncode

    def calls(self, name: str) -> list[dict[str, Any]]:
        """How a program was called, in order."""
        calls = [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]
        return [call for call in calls if call["name"] == name]


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def config_after(argv: list[str]) -> Config:
    """What train.py understands of what follows its name in a command line."""
    return command_line.parse(argv[argv.index("train.py") + 1 :])


@pytest.mark.parametrize("file", SHELL, ids=lambda file: file.name)
def test_shells_can_read_them(file: Path) -> None:
    done = subprocess.run(["bash", "-n", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert file.name == "environment.sh" or file.name.endswith("sbatch") or os.access(file, os.X_OK)


def test_shellcheck_has_nothing_to_say() -> None:
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed: apt-get install shellcheck")
    command = ["shellcheck", "--external-sources", *map(str, SHELL)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_what_every_host_needs_is_set(stage: Stage) -> None:
    python = stage.program("python")
    arguments = ("two_terminals.sh", 1, 2, "node1:1234", "--recipe", "v2")
    assert stage.run(*arguments, PYTHON=python, INTERFACE="ib0") == 0
    assert stage.run(*arguments, PYTHON=python, GLOO_SOCKET_IFNAME="eth1") == 0
    with_interface, plain = (call["env"] for call in stage.calls("python"))
    assert with_interface["NCCL_SOCKET_IFNAME"] == with_interface["GLOO_SOCKET_IFNAME"] == "ib0"
    assert plain["NCCL_SOCKET_IFNAME"] is None and plain["GLOO_SOCKET_IFNAME"] == "eth1"
    assert plain["OMP_NUM_THREADS"] == "1"


def test_two_terminals(stage: Stage) -> None:
    python = stage.program("python")
    for arguments in ((1, 2, "node1:1234"), (1, 2, "localhost")):
        assert stage.run("two_terminals.sh", *arguments, "--recipe", "v2", PYTHON=python) == 0
    assert stage.run("two_terminals.sh", 1, 2, PYTHON=python) == 2
    there, here = stage.calls("python")
    assert config_after(there["argv"]).recipe == "v2"
    assert there["cwd"] == str(REPOSITORY)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    assert [there["env"][n] for n in names] == ["1", "2", "0", "node1", "1234"]
    assert [here["env"][n] for n in names] == ["1", "2", "1", "localhost", "29500"]


def test_torchrun(stage: Stage) -> None:
    torchrun = stage.program("torchrun")
    assert stage.run("torchrun_elastic.sh", TORCHRUN=torchrun) != 0  # where do they meet?
    assert not (stage.folder / "calls").exists()
    where = {"RENDEZVOUS": "node1:29400", "NODES": "2:4", "GPUS": 8}
    flags = ("--recipe", "v2", "--checkpoint-freq", 500)
    assert stage.run("torchrun_elastic.sh", *flags, TORCHRUN=torchrun, **where) == 0
    (call,) = stage.calls("torchrun")
    args = torch.distributed.run.get_args_parser().parse_args(call["argv"])
    assert (args.nnodes, args.nproc_per_node, args.max_restarts) == ("2:4", "8", 10)
    assert (args.rdzv_backend, args.rdzv_endpoint, args.rdzv_id) == ("c10d", "node1:29400", "moco")
    assert args.training_script == "train.py"
    assert config_after(call["argv"]).run.checkpoint_freq == 500


def test_deepspeed(stage: Stage) -> None:
    from deepspeed.launcher import runner

    program = stage.program("deepspeed")
    assert stage.run("deepspeed_hostfile.sh", DEEPSPEED=program, NODE_RANK=1) != 0
    assert not (stage.folder / "calls").exists()
    flags = ("--recipe", "v2", "--output-dir", "/shared/run")
    assert stage.run("deepspeed_hostfile.sh", *flags, DEEPSPEED=program, INTERFACE="ib0") == 0
    alone = {"NODE_RANK": 1, "MASTER_ADDR": "node1", "MASTER_PORT": 1234}
    assert stage.run("deepspeed_hostfile.sh", *flags, DEEPSPEED=program, **alone) == 0
    over_ssh, without = stage.calls("deepspeed")
    for call in (over_ssh, without):
        args = runner.parse_args(call["argv"])
        hosts = runner.fetch_hostfile(str(REPOSITORY / args.hostfile))
        assert dict(hosts) == {"node1": 8, "node2": 8}
        assert args.user_script == "train.py"
        assert config_after(call["argv"]).run.output_dir == "/shared/run"
    args = runner.parse_args(over_ssh["argv"])
    assert (args.no_ssh, args.master_addr, args.master_port) == (False, "", 29500)
    assert {"GLOO_SOCKET_IFNAME=ib0", "OMP_NUM_THREADS=1"} <= set(over_ssh["file"].split())
    assert not Path(over_ssh["env"]["DS_ENV_FILE"]).exists()
    args = runner.parse_args(without["argv"])
    assert (args.no_ssh, args.node_rank) == (True, 1)
    assert (args.master_addr, args.master_port) == ("node1", 1234)


@pytest.mark.parametrize("named", [False, True])
def test_deepspeed_s_own_file_of_variables_is_kept(stage: Stage, named: bool) -> None:
    program = stage.program("deepspeed")
    (stage.folder / ".deepspeed_env").write_text("HOME_SAYS=a b\n\n# mine\nOMP_NUM_THREADS=4")
    (stage.folder / "mine").write_text("MINE_SAYS=1=2")
    file = {"DS_ENV_FILE": stage.folder / "mine"} if named else {}
    home = {"HOME": stage.folder, "DEEPSPEED": program, "INTERFACE": "ib0"}
    assert stage.run("deepspeed_hostfile.sh", "--recipe", "v2", **home, **file) == 0
    (call,) = stage.calls("deepspeed")
    # As DeepSpeed reads it: every line has to be one, and the last one of a name counts.
    said = dict(line.split("=", maxsplit=1) for line in call["file"].splitlines())
    if named:
        wanted = {"OMP_NUM_THREADS": "1", "MINE_SAYS": "1=2"}
    else:
        wanted = {"OMP_NUM_THREADS": "4", "HOME_SAYS": "a b"}
    assert said == wanted | {"GLOO_SOCKET_IFNAME": "ib0"}
    assert {path.name for path in stage.folder.iterdir()} >= {".deepspeed_env", "mine"}


def sbatch(stage: Stage, *arguments: object, **variables: object) -> int:
    """slurm.sbatch as Slurm runs it: a copy elsewhere, with the variables of a job."""
    if not (stage.programs / "srun").exists():
        stage.program("srun", text=SRUN)
    copy = stage.folder / "slurm_script"
    shutil.copy(SCRIPTS / "slurm.sbatch", copy)
    job = {
        "SLURM_SUBMIT_DIR": REPOSITORY,
        "SLURM_JOB_NAME": "moco",
        "SLURM_JOB_ID": 4711,
        "SLURM_JOB_NODELIST": "gpu[07-08]",
        "SLURM_NNODES": 2,
        "SLURM_NTASKS": 4,
        "SLURM_TASKS_PER_NODE": "2(x2)",
        "SLURM_CPUS_PER_TASK": 3,
    }
    return stage.run(str(copy), *arguments, **job | variables)


def test_slurm_starts_a_task_for_each_gpu(stage: Stage) -> None:
    python, scontrol = stage.program("python"), stage.program("scontrol")
    assert sbatch(stage, "--recipe", "v2", "--nce-k", 4096, PYTHON=python) == 0
    tasks = stage.calls("python")
    assert len(tasks) == 4 and scontrol.exists() and not stage.calls("scontrol")
    understood = []
    for task in tasks:
        config = config_after(task["argv"])
        assert (config.recipe, config.contrast.nce_k, config.run.num_workers) == ("v2", 4096, 2)
        assert config.run.output_dir == "runs/moco-4711"
        assert task["cwd"] == str(REPOSITORY)
        environ = dict(task["slurm"])
        launchers.complete_environment(environ)
        understood.append([environ[name] for name in (*WATCHED[:4], "LOCAL_WORLD_SIZE")])
    assert sorted(understood) == [
        [str(rank), str(rank % 2), "4", "gpu07", "2"] for rank in range(4)
    ]
    options = (stage.folder / "srun").read_text().split()
    assert options == ["--cpus-per-task=3", "--kill-on-bad-exit=0", "--wait=900"]
    # Tasks that are left have to have the time to notice, and say, which one is gone.
    assert config_after(tasks[0]["argv"]).run.hang_timeout < 900


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"),
    [
        *((75, 0, 1), (75, 99, 1)),  # saved, and as often as it takes
        *((69, 4, 1), (137, 0, 1), (69, 5, 0), (137, 5, 0)),  # a process was lost
        *((134, 0, 1), (135, 0, 1), (139, 4, 1), (134, 5, 0)),  # or crashed, or NCCL ended it
        *((2, 0, 0), (1, 0, 0), (0, 0, 0)),
    ],
)
def test_slurm_requeues_what_can_go_on(
    stage: Stage, status: int, restarts: int, requeued: int
) -> None:
    stage.program("scontrol")
    python = stage.program("python", status)
    # The real one does not set it the first time.
    before = {"SLURM_RESTART_COUNT": restarts} if restarts else {}
    assert sbatch(stage, PYTHON=python, **before) == status
    assert [call["argv"] for call in stage.calls("scontrol")] == [["requeue", "4711"]] * requeued


def test_slurm_leaves_a_cancelled_job_alone(stage: Stage) -> None:
    stage.program("scontrol")
    python = stage.program("python", text="#!/bin/sh\nexit 0\n")
    stage.program("srun", text=SRUN.replace('exit "$worst"', "kill -TERM $PPID; exit 75"))
    assert sbatch(stage, PYTHON=python) == 75
    assert not (stage.folder / "calls").exists()


def test_slurm_arrays_have_a_folder_and_a_seed_each(stage: Stage) -> None:
    element = {"SLURM_ARRAY_JOB_ID": 4700, "SLURM_ARRAY_TASK_ID": 3, "SLURM_NTASKS": 2}
    python = stage.program("python")
    assert sbatch(stage, **element, PYTHON=python) == 0
    assert sbatch(stage, "--rng-seed", 9, **element, PYTHON=python, OUTPUT_DIR="runs/own") == 0
    configs = [config_after(call["argv"]) for call in stage.calls("python")]
    found = [(c.run.output_dir, c.optim.rng_seed) for c in configs]
    assert found == [("runs/moco-4700-3", 3)] * 2 + [("runs/own", 9)] * 2


def test_slurm_preflight_comes_first_and_decides(stage: Stage) -> None:
    assert sbatch(stage, PYTHON=stage.program("python"), PREFLIGHT=1) == 0
    assert ["--preflight" in call["argv"] for call in stage.calls("python")] == [True] * 4 + [
        False
    ] * 4
    (stage.folder / "calls").write_text("")
    assert sbatch(stage, PYTHON=stage.program("python", 2), PREFLIGHT=1) == 2
    assert len(stage.calls("python")) == 4


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_slurm_goes_on_until_it_is_done(stage: Stage, tiny_shards: Path) -> None:
    """A job whose time is always up after a step or two, put back into the queue as Slurm does."""
    stage.program("scontrol")
    out = stage.folder / "out"
    flags = (*TINY, "--data-dir", tiny_shards, "--epochs", 1, "--max-time", 1e-6)
    host = {"SLURM_NNODES": 1, "SLURM_NTASKS": 2, "SLURM_JOB_NODELIST": "localhost"}
    statuses: list[int] = []
    while not statuses or statuses[-1] == 75:
        (stage.folder / "calls").write_text("")
        statuses.append(
            sbatch(stage, *flags, **host, PYTHON=sys.executable, OUTPUT_DIR=out, INTERFACE="lo")
        )
        assert len(stage.calls("scontrol")) == (statuses[-1] == 75)
        assert len(statuses) < 5
    assert statuses[-1] == 0 and len(statuses) > 1
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def manifest(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((SCRIPTS / name).read_text()))


def only(container: dict[str, Any]) -> dict[str, str]:
    """The variables of a container."""
    return {each["name"]: each["value"] for each in container["env"]}


def check_pod(pod: dict[str, Any]) -> dict[str, Any]:
    """What both kinds of job need of a pod; its only container."""
    (container,) = pod["containers"]
    names = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == names
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    memory = next(v for v in pod["volumes"] if v["name"] == mounts["/dev/shm"])
    assert memory["emptyDir"]["medium"] == "Memory"
    assert {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"} <= only(container).keys()
    assert all(isinstance(value, str) for value in only(container).values())
    assert pod["terminationGracePeriodSeconds"] > 30
    return container


def test_kubeflow_trainer() -> None:
    runtime, job = manifest("kubernetes.yaml")
    assert [each["kind"] for each in (runtime, job)] == ["TrainingRuntime", "TrainJob"]
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    # Trainer 2.2 and later refuse any setting here; processes are counted by the GPUs asked for.
    assert runtime["spec"]["mlPolicy"]["torch"] == {}
    assert job["spec"]["trainer"]["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == 8
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert replicated["name"] == "node"
    assert check_pod(replicated["template"]["spec"]["template"]["spec"])["name"] == "node"
    trainer = job["spec"]["trainer"]
    assert trainer["command"] == ["torchrun", "train.py"]
    config = config_after(trainer["command"] + trainer["args"])
    assert config.run.output_dir.startswith("/storage/")


def test_training_operator() -> None:
    (job,) = manifest("kubernetes_pytorchjob.yaml")
    assert job["kind"] == "PyTorchJob"
    workers = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    elastic = job["spec"]["elasticPolicy"]
    assert elastic["minReplicas"] <= workers["replicas"] <= elastic["maxReplicas"]
    container = check_pod(workers["template"]["spec"])
    assert container["name"] == "pytorch"
    assert container["command"] == ["torchrun", "train.py"]
    config = config_after(container["command"] + container["args"])
    trainer = manifest("kubernetes.yaml")[1]["spec"]["trainer"]
    assert config == config_after(trainer["command"] + trainer["args"])


def test_flags_that_the_page_and_the_files_name_exist() -> None:
    known = {s for a in command_line.make_parser()._actions for s in a.option_strings}
    page = (REPOSITORY / "docs" / "multi-node.md").read_text()
    commands = re.findall(r"train\.py ((?:[^\n`]|\\\n)*)", page)
    commands += [(SCRIPTS / "slurm.sbatch").read_text().partition("set -eu")[0]]
    named = {flag for text in commands for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", text)}
    sbatch_options = {"--nodes", "--partition", "--array", "--signal", "--requeue", "--open-mode"}
    sbatch_options |= {"--job-name", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task"}
    sbatch_options |= {"--time", "--output"}
    assert named - sbatch_options <= known
    assert len(named & known) >= 5


def test_the_readmes_example_of_several_hosts_is_what_the_plan_recommends(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = (REPOSITORY / "README.md").read_text()
    (nodes, flags) = re.findall(r"^sbatch --nodes=(\d+) scripts/slurm\.sbatch (.*)$", text, re.M)[0]
    assert moco_scale_main(["plan", "--nodes", nodes, "--gpus", "8", *flags.split()]) == 0
    assert "\n- " not in capsys.readouterr().out  # no advice
