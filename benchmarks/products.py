"""The matrix products of a training step on a CPU, fp32: the kernels' against PyTorch's, in turn in one process.

    python benchmarks/products.py [--model mini|base] [--json]
"""



from measuring import alternate, machine, report, spread  # puts the repository's root on the path
from train_step import PREDICTIONS, SHAPES, VOCABULARY

# isort: split
from common import cli


def main(argv=None) -> None:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=("mini", "base"), default="mini", help="whose step, on which batch")
    parser.add_argument("--repeats", type=cli.positive_int, default=15, help="timed repeats of each")
    parser.add_argument("--threads", type=cli.positive_int, default=2, help="CPU threads")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)

    import torch

    torch.set_num_threads(args.threads)
    products = [measure(*product, args.repeats) for product in products_of_step(args.model)]
    totals = {name: sum(found["times_a_step"] * found["seconds"][name]["median"] for found in products)
              for name in ("kernels", "pytorch")}
    figures = {"model": args.model, "products": products, "seconds_a_step": totals,
               "ratio_vs_pytorch": totals["pytorch"] / totals["kernels"], "machine": machine()}
    report(figures, args.json, [
        f"products of a step of BERT-{args.model}, {args.threads} threads: GFLOP/s of the kernels, of PyTorch",
        *(f"  {found['name']:44s}{found['shape']:22s}"
          f"{found['gflops']['kernels']:6.0f}{found['gflops']['pytorch']:6.0f}"
          for found in products),
        f"  in all {totals['kernels']:.3f} s against {totals['pytorch']:.3f} s: "
        f"{figures['ratio_vs_pytorch']:.2f} times as fast"])


def products_of_step(model: str) -> list[tuple]:
    """Name, M, N, K, which factor is transposed in memory, and how many a step has, attention's small ones aside."""
    layers, width, _, rows, length, _ = SHAPES[model]
    tokens, inner, masked = rows * length, 4 * width, rows * PREDICTIONS[length]
    dense = [("query, key, value", tokens, 3 * width, width, layers),
             ("attention output", tokens, width, width, layers),
             ("intermediate", tokens, inner, width, layers), ("output", tokens, width, inner, layers),
             ("decoder", masked, VOCABULARY, width, 1)]
    return [product for name, count, out, into, times in dense for product in (
        (name, count, out, into, "second", times), (f"{name}, gradient of its input", count, into, out, "", times),
        (f"{name}, of its weight", out, into, count, "first", times))]


def measure(name: str, rows: int, columns: int, depth: int, transposed: str, times: int, repeats: int) -> dict:
    """Figures of one product (M, K) · (K, N), whose result goes to memory that is there."""
    import torch

    from ops.cpu_layers import matmul
    from ops.memory_pool import pool

    def factor(rows, columns, transposed):
        return (pool.empty(columns, rows).normal_().t() if transposed else pool.empty(rows, columns).normal_())

    a, b = factor(rows, depth, transposed == "first"), factor(depth, columns, transposed == "second")
    out = pool.empty(rows, columns)
    functions = {"kernels": lambda: matmul(a, b), "pytorch": lambda: torch.mm(a, b, out=out)}
    seconds = {name: spread(values) for name, values in alternate(functions, repeats).items()}
    return {"name": name, "shape": f"{rows} x {columns} x {depth}", "times_a_step": times, "seconds": seconds,
            "gflops": {name: 2e-9 * rows * columns * depth / found["median"] for name, found in seconds.items()}}


if __name__ == "__main__":
    cli.run(main)
