"""Evaluate a pretrained encoder by linear classification or kNN.

``python eval.py --data-dir DIR --pretrained-model OUT/current.pth --output-dir OUT/eval``, or the
same under ``torchrun``, ``deepspeed``, or Slurm's ``srun`` with one task per GPU.
"""

if __name__ == "__main__":
    import moco_scale.utils.quiet  # noqa: F401

from moco_scale.commands.exit_status import run_program


def main() -> None:
    from moco_scale.commands import evaluate

    evaluate.main()


if __name__ == "__main__":
    run_program("eval.py", main)
