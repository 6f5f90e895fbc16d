"""Pretrain: ``deepspeed --num_gpus 8 train.py --deepspeed ds_configs/zero1.json --data-dir DIR``.

Also under ``torchrun``, under Slurm's ``srun`` with one task per GPU, or as plain ``python``.
"""

if __name__ == "__main__":
    import moco_scale.utils.quiet  # noqa: F401

from pathlib import Path

from moco_scale.commands.exit_status import run_program


def main() -> None:
    from moco_scale.config import command_line
    from moco_scale.distributed import collectives

    settings = command_line.parse()
    timeout = settings.run.hang_timeout
    collectives.initialize(settings.run.device, hang_timeout=timeout)
    from moco_scale.observe.phases import Phases
    from moco_scale.observe.watchdog import Watch

    phases = Phases()
    with Watch(phases, timeout, Path(settings.run.output_dir), "train.py"):
        if settings.run.preflight:
            from moco_scale.commands import preflight

            preflight.run(settings, phases)
        else:
            from moco_scale.training.loop import train
            from moco_scale.training.run import Run

            train(Run(settings, phases))
    collectives.shutdown()


if __name__ == "__main__":
    run_program("train.py", main)
