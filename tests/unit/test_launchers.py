"""What each launcher's environment is understood as."""

import pytest

from moco_scale.distributed.launchers import (
    complete_environment,
    first_host,
    gpu_of,
    rank_of,
    tasks_per_node,
)
from moco_scale.utils.errors import UserError

SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NODELIST": "gpu[07-08,12]",
    "SLURM_TASKS_PER_NODE": "4(x3)",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[08,12]",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_NTASKS": "12",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
WORDS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def understood(**environ: str) -> list[str | None]:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT afterwards."""
    complete_environment(environ)
    return [environ.get(word) for word in WORDS]


def refused(**environ: str) -> str:
    with pytest.raises(UserError) as error:
        complete_environment(environ)
    return str(error.value)


def test_no_launcher_is_one_process() -> None:
    assert understood() == ["0", "1", "0", "1", None, None]


def test_a_batch_script_is_one_process_whatever_its_job_has() -> None:
    batch = {k: v for k, v in SRUN.items() if "STEP" not in k} | {"SLURM_PROCID": "0"}
    assert understood(**batch)[:2] == ["0", "1"]


def test_what_torchrun_says_stays() -> None:
    said = dict(zip(WORDS, ("5", "8", "1", "4", "node-a", "1234"), strict=True))
    assert understood(**said) == list(said.values())
    # Whatever else is around: torchrun was started by srun, or by mpirun.
    assert understood(**said, **SRUN, **MPIRUN) == list(said.values())


def test_deepspeed_has_its_own_name_for_the_processes_of_a_host() -> None:
    said = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_SIZE": "2"}
    said |= {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert understood(**said) == ["2", "4", "0", "2", "10.0.0.1", "29500"]


def test_two_terminals_on_one_host() -> None:
    got = understood(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1")
    assert got == ["1", "2", "1", "2", "127.0.0.1", "29500"]


def test_a_pod_of_one_process() -> None:
    said = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
    assert understood(**said) == ["1", "2", "0", None, "job-master-0", "23456"]


def test_a_pod_made_for_torchrun_is_told_to_use_it() -> None:
    pod = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "8", "PET_NODE_RANK": "1"}
    assert "`torchrun train.py ...`" in refused(**pod)
    assert understood(PET_NNODES="1")[1] == "1"


def test_srun() -> None:
    rank, world, local, local_world, address, port = understood(**SRUN)
    assert (rank, world, local, local_world, address) == ("5", "7", "1", "3", "gpu08")
    assert port is not None and 12000 <= int(port) < 32000
    # Every task finds the same port; steps beside each other find others.
    first = SRUN | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    assert understood(**first) == ["0", "7", "0", "4", "gpu08", port]
    assert understood(**SRUN | {"SLURM_STEP_ID": "1"})[5] != port
    assert understood(**SRUN | {"SLURM_JOB_ID": "4712"})[5] != port


def test_srun_with_what_the_job_script_exports() -> None:
    got = understood(**SRUN, MASTER_ADDR="ib0.gpu08", MASTER_PORT="29501")
    assert got[4:] == ["ib0.gpu08", "29501"]


def test_srun_of_fewer_tasks_than_the_job_has() -> None:
    step = {k: v for k, v in SRUN.items() if k != "SLURM_STEP_TASKS_PER_NODE"}
    assert understood(**step)[3] is None  # 4(x3) is the job's: 12 tasks, not 7


def test_mpirun() -> None:
    here = understood(**MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, PMIX_NAMESPACE="prte-a@1")
    assert here[:5] == ["3", "4", "1", "4", "127.0.0.1"]
    there = understood(**MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, PMIX_NAMESPACE="prte-b@1")
    assert here[5] != there[5]
    assert "mpirun -x MASTER_ADDR=HOST_OF_RANK_0" in refused(**MPIRUN)
    named = understood(**MPIRUN, MASTER_ADDR="node-a")
    assert named == ["3", "4", "1", "2", "node-a", "29500"]
    inside = understood(**MPIRUN, SLURM_JOB_NODELIST="gpu[08,12]")
    assert inside[4] == "gpu08"


def test_pmi() -> None:
    assert understood(**HYDRA)[:5] == ["1", "2", "1", "2", "127.0.0.1"]
    cray = {"PMI_RANK": "3", "PMI_SIZE": "4", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "2"}
    assert understood(**cray, MASTER_ADDR="nid1")[:5] == ["3", "4", "1", "2", "nid1"]
    assert "mpiexec -genv MASTER_ADDR" in refused(**cray)
    assert "MPI_LOCALRANKID, PMI_LOCAL_RANK" in refused(PMI_RANK="0", PMI_SIZE="2")
    assert understood(PMI_RANK="0", PMI_SIZE="1")[:4] == ["0", "1", "0", "1"]


def test_which_gpu_is_whose() -> None:
    task = complete_environment(dict(SRUN) | {"SLURM_LOCALID": "3"})
    assert gpu_of(task, 8) == 3
    assert gpu_of(task, 1) == 0  # Slurm has hidden the others
    assert gpu_of(task, 2) is None
    # torchrun inherits the variables of srun, and its processes those of torchrun.
    said = dict(zip(WORDS, ("3", "8", "3", "8", "node-a", "1234"), strict=True))
    process = complete_environment(said | SRUN)
    assert gpu_of(process, 8) == 3
    assert gpu_of(process, 1) is None
    assert gpu_of(complete_environment({}), 1) == 0


def test_what_is_wrong_is_named() -> None:
    assert "RANK=1 is set but WORLD_SIZE is not" in refused(RANK="1")
    assert "WORLD_SIZE=2 is set but RANK is not" in refused(WORLD_SIZE="2")
    assert "rank 2 of 2 processes" in refused(RANK="2", WORLD_SIZE="2")
    assert "a job of 0 processes" in refused(RANK="0", WORLD_SIZE="0")
    assert "RANK='first' in the environment" in refused(RANK="first", WORLD_SIZE="2")
    assert "MASTER_PORT='any'" in refused(RANK="0", WORLD_SIZE="2", MASTER_PORT="any")
    assert "LOCAL_RANK='-1'" in refused(RANK="0", WORLD_SIZE="2", LOCAL_RANK="-1")
    nameless = {k: v for k, v in SRUN.items() if "NODELIST" not in k}
    assert "export MASTER_ADDR=$(scontrol show hostnames" in refused(**nameless)
    broken = {k: v for k, v in MPIRUN.items() if k != "OMPI_COMM_WORLD_SIZE"}
    assert "OMPI_COMM_WORLD_SIZE is not set" in refused(**broken)
    assert "tasks per node 'many'" in refused(**SRUN | {"SLURM_STEP_TASKS_PER_NODE": "many"})


def test_the_rank_for_messages_never_fails() -> None:
    assert rank_of({}) == 0
    assert rank_of(SRUN) == 5
    assert rank_of(MPIRUN) == 3
    assert rank_of({"RANK": "first"}) == 0


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[01-04,7],gpu3", "node01"),
        ("node[7,1-4]", "node7"),
        ("gpu3,node[01-04]", "gpu3"),
        ("rack[1-2]n[003-010]", "rack1n003"),
        ("rack[1-2]n[003-010]x,y", "rack1n003x"),
        ("a-b.cluster.example,c", "a-b.cluster.example"),
        (" tux[0-9]-ib ", "tux0-ib"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


@pytest.mark.parametrize("nodes", ["", ",a", "node[", "node[01-04", "node]1[", "node[a-b]", "a b"])
def test_a_list_that_cannot_be_read_is_named(nodes: str) -> None:
    with pytest.raises(UserError, match=r"cannot read the first host .*set MASTER_ADDR"):
        first_host(nodes)


def test_tasks_per_node() -> None:
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert tasks_per_node("8") == [8]


@pytest.mark.parametrize("text", ["2(x999999999999)", "9" * 5000, "2(x)", "-1,3"])
def test_tasks_per_node_that_no_cluster_has_are_named(text: str) -> None:
    with pytest.raises(UserError, match="cannot read Slurm's tasks per node") as error:
        tasks_per_node(text)
    assert len(str(error.value)) < 400


def test_a_job_has_a_process() -> None:
    with pytest.raises(UserError, match="a job of 0 processes; there is at least 1"):
        complete_environment({"RANK": "0", "WORLD_SIZE": "0"})
