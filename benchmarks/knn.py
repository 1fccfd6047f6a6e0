"""Time and memory of the k-NN accuracy on a bank of ImageNet's size.

    python benchmarks/knn.py [--bank 1280000] [--width 384] [--queries 2000] [--k 20]

Memory is the growth of the process's peak resident size (VmHWM) over what was there before: bank, queries and libraries. The
queries are taken in chunks, so it does not grow with their number. Linux only.
"""

import argparse
import time

import torch

from dino_lightning.evaluation import knn_accuracy


def peak_gb():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 2**20


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--bank", type=int, default=1_280_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--k", type=int, default=20)
    args = parser.parse_args()
    torch.manual_seed(0)
    bank, queries = torch.randn(args.bank, args.width), torch.randn(args.queries, args.width)
    labels, truth = torch.randint(1000, (args.bank,)), torch.randint(1000, (args.queries,))
    before, start = peak_gb(), time.perf_counter()
    knn_accuracy(bank, labels, queries, truth, k=args.k)
    seconds = time.perf_counter() - start
    print(
        f"k = {args.k}: {peak_gb() - before:.2f} GB beside the bank's {bank.nbytes / 2**30:.2f} GB; "
        f"{seconds:.0f} s for {args.queries} queries"
    )
