"""Pretrain: ``deepspeed --num_gpus 8 train.py --deepspeed ds_configs/zero1.json --data-dir DIR``.

Also under ``torchrun``, under Slurm's ``srun`` with one task per GPU, or as plain ``python``.
"""

from moco_scale.cli import leave, run_command


def main() -> None:
    from moco_scale import command_line, distributed

    settings = command_line.parse()
    distributed.initialize(settings.run.device)
    if settings.run.preflight:
        from moco_scale import preflight

        preflight.run(settings)
    else:
        from moco_scale.pretrain import Pretraining

        Pretraining(settings).run()
    distributed.shutdown()


if __name__ == "__main__":
    leave(run_command("train.py", main))
