"""Pretrain: ``deepspeed --num_gpus 8 train.py --deepspeed ds_configs/zero1.json --data-dir DIR``.

Also under ``torchrun``, under Slurm's ``srun`` with one task per GPU, or as plain ``python``.
"""

if __name__ == "__main__":
    import moco_scale.utils.quiet  # noqa: F401

from moco_scale.commands.dispatch import script

if __name__ == "__main__":
    script("train", "train.py")
