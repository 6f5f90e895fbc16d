"""Evaluate a pretrained encoder by linear classification or kNN.

``python eval.py --data-dir DIR --pretrained-model OUT/current.pth --output-dir OUT/eval``, or the
same under ``torchrun``, ``deepspeed``, or Slurm's ``srun`` with one task per GPU.
"""

if __name__ == "__main__":
    import moco_scale.utils.quiet  # noqa: F401

from moco_scale.commands.dispatch import script

if __name__ == "__main__":
    script("evaluate", "eval.py")
