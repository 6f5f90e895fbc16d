"""What a preflight makes of what it finds."""

from moco_scale.commands.preflight import (
    GIB,
    Machine,
    bandwidth_table,
    machine_table,
    notes,
    problems,
    shared_memory_needed,
)
from moco_scale.distributed.bandwidth import Bandwidth

GOOD = Machine("node-a", "H100", "id-0", 80 * GIB, 16, 64 * GIB, 65536, 1000.0)


def job(*changes: dict[str, object]) -> list[Machine]:
    """A machine for each rank, all with a GPU of their own unless changed."""
    return [
        GOOD._replace(device_id=f"id-{rank}")._replace(**change)  # type: ignore[arg-type]
        for rank, change in enumerate(changes)
    ]


def test_a_good_job_has_neither_problems_nor_notes() -> None:
    machines = job({}, {}, {"host": "node-b"}, {"host": "node-b", "clock": 1001.0})
    assert problems(machines, GIB) == []
    assert notes(machines, 100 * GIB) == []


def test_a_gpu_of_two_ranks() -> None:
    (line,) = problems(job({}, {"device_id": "id-2"}, {}, {}), 0)
    assert line.startswith("ranks 1-2 (node-a) share one GPU: start one process per GPU")
    # CPUs may be shared.
    assert problems(job({"device_id": ""}, {"device_id": ""}), 0) == []


def test_shared_memory_is_that_of_a_host() -> None:
    machines = job({}, {}, {"host": "node-b", "shared_memory": GIB})
    assert problems(machines, GIB) == []
    (line,) = problems(machines, 2 * GIB)
    assert line.startswith("node-b: /dev/shm has 1.0 GiB free, the workers of 1 process(es) need 2")
    assert len(problems(machines, 33 * GIB)) == 2
    assert shared_memory_needed(64, 224, 0) == 0
    assert shared_memory_needed(64, 224, 4) == 9 * 2 * 64 * 3 * 224 * 224


def test_what_is_worth_a_note() -> None:
    machines = job({}, {"host": "node-b", "clock": 995.0, "device": "V100", "open_files": 1024})
    clock, kinds, disk, files = notes(machines, GIB)
    assert clock.startswith("the clock of node-b is 5.0 s behind that of node-a")
    assert kinds.startswith("processes compute on H100, V100")
    assert disk == "only 1.0 GiB are free for --output-dir"
    assert files.startswith("rank 1 (node-b) may open 1024 files")
    assert notes(job({"open_files": -1}), 100 * GIB) == []  # no limit


def test_like_ranks_of_a_host_share_a_line() -> None:
    assert machine_table(job({}, {}, {"host": "b", "device": "V100"}, {})) == [
        "ranks   host    device  memory    cores  /dev/shm free  open files",
        "0-1, 3  node-a  H100    80.0 GiB  16     64.0 GiB       65536",
        "2       b       V100    80.0 GiB  16     64.0 GiB       65536",
    ]


def test_bandwidth_is_a_column_for_each_reach() -> None:
    near = Bandwidth(8, 64 << 20, 2e11, 1e11, 2e-5)
    far = Bandwidth(16, 64 << 20, 2e10, 5e9, 1e-4)
    lines = bandwidth_table([("within a host", near), ("all", far)])
    assert [" ".join(line.split()) for line in lines] == [
        "bandwidth per process within a host (8) all (16)",
        "all-reduce of 64 MiB 200.00 GB/s 20.00 GB/s",
        "all-to-all of 64 MiB 100.00 GB/s 5.00 GB/s",
        "all-reduce of one number 0.02 ms 0.10 ms",
    ]
