"""InfoNCE against a long queue: ``python scripts/gpu_check/contrast.py [--device cuda] [--tiny]``.

Forward and backward of :func:`methods.infonce.infonce` and of the usual clone, einsum, cat and
cross_entropy, N = 256 queries of 128 numbers against K = 65,536 and 1,048,576 keys, in fp32 without
TF32. Losses and gradients must agree. The last line is one JSON object; for each K:

    ours_ms_K, usual_ms_K       median milliseconds
    ours_mib_K, usual_mib_K     most memory allocated beside the queue on a GPU, MiB
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moco_scale.methods.infonce import Negatives, infonce

DIM, TEMPERATURE = 128, 0.2
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(query: Tensor, positive: Tensor, queue: Tensor) -> Tensor:
    return infonce(query, positive, Negatives(queue), TEMPERATURE).loss.mean()


def usual(query: Tensor, positive: Tensor, queue: Tensor) -> Tensor:
    own = torch.einsum("nc,nc->n", query, positive)[:, None]
    others = torch.einsum("nc,kc->nk", query, queue.clone().detach())
    logits = torch.cat([own, others], dim=1) / TEMPERATURE
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long, device=query.device))


def timed(loss: Loss, tensors: tuple[Tensor, ...]) -> tuple[float, float, Tensor, Tensor]:
    """Seconds, MiB, the loss and the query's gradient of one forward and backward pass."""
    on_gpu = tensors[0].is_cuda
    query = tensors[0].detach().requires_grad_()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    value = loss(query, *tensors[1:])
    value.backward()
    if on_gpu:
        torch.cuda.synchronize()
    spent = time.perf_counter() - start
    used = (torch.cuda.max_memory_allocated() - before) / 2**20 if on_gpu else 0.0
    assert query.grad is not None
    return spent, used, value.detach(), query.grad


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--tiny", action="store_true", help="16 queries, 2,048 and 4,096 keys")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    generator = torch.Generator().manual_seed(0)
    n, lengths = (16, (2048, 4096)) if args.tiny else (256, (1 << 16, 1 << 20))
    result: dict[str, float] = {}
    for length in lengths:
        query, positive, queue = (
            F.normalize(torch.randn(rows, DIM, generator=generator), dim=1).to(args.device)
            for rows in (n, n, length)
        )
        times: dict[str, list[float]] = {"ours": [], "usual": []}
        memory = dict.fromkeys(times, 0.0)
        for repeat in range(12):
            found = {}
            for name, loss in (("ours", ours), ("usual", usual)):
                spent, used, *found[name] = timed(loss, (query, positive, queue))
                if repeat >= 2:
                    times[name].append(spent)
                    memory[name] = max(memory[name], used)
            for mine, theirs in zip(found["ours"], found["usual"], strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
        for name, spents in times.items():
            result[f"{name}_ms_{length}"] = round(statistics.median(spents) * 1e3, 3)
            if args.device == "cuda":
                result[f"{name}_mib_{length}"] = round(memory[name], 1)
        found_here = {k: v for k, v in result.items() if k.endswith(f"_{length}")}
        print(", ".join(f"{name} {value}" for name, value in found_here.items()), flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
