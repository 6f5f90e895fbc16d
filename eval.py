"""Evaluate a pretrained encoder by linear classification or kNN.

``python eval.py --data-dir DIR --pretrained-model OUT/current.pth --output-dir OUT/eval``, or the
same under ``torchrun``, ``deepspeed``, or Slurm's ``srun`` with one task per GPU.
"""

if __name__ == "__main__":
    import moco_scale.utils.quiet  # noqa: F401

from moco_scale.cli import run_program


def main() -> None:
    from moco_scale.evaluation import command

    command.main()


if __name__ == "__main__":
    run_program("eval.py", main)
