"""``python -m benchmarks.roofline``: counts operations, bytes and the least time of a network, part by part."""

import argparse

from benchmarks.harness.counting import H200, Machine, Network, passes
from dfn_fast import cli
from dfn_fast.network.backbone import LAYERS


def table(network: Network, machine: Machine, training: bool, element_size: int) -> str:
    """A line a part: operations, bytes, and its share of the floor."""
    parts: dict[str, list[float]] = {}
    for layer in network.layers():
        n = passes(layer, training)
        work, moved = n * layer.flops, n * layer.bytes(element_size)
        seconds = max(work / machine.flops, moved / machine.bandwidth)
        sums = parts.setdefault(layer.part, [0.0, 0.0, 0.0])
        parts[layer.part] = [a + b for a, b in zip(sums, (work, moved, seconds), strict=True)]
    parts["all"] = [sum(values) for values in zip(*parts.values(), strict=True)]
    whole = parts["all"][2]
    lines = [f"{'part':16} {'GFLOP':>10} {'MB':>10} {'floor ms':>9} {'share':>6}"]
    for name, (work, moved, seconds) in parts.items():
        lines.append(f"{name:16} {work / 1e9:10.1f} {moved / 1e6:10.1f} {seconds * 1e3:9.3f} {seconds / whole:6.1%}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser(
        prog="python -m benchmarks.roofline",
        usage="%(prog)s [options]",
        description="Count the operations, the bytes and the least time of DFN, part by part.",
    )
    add = parser.add_argument
    add("--backbone", choices=tuple(LAYERS), default="resnet101", metavar="NAME", help="resnet18 ... resnet152")
    add("--size", type=cli.size, default=(512, 512), metavar="SIZE", help="image size, HxW (default: 512x512)")
    add("--batch", type=int, default=1, metavar="N", help="batch size (default: 1)")
    add("--classes", type=int, default=21, metavar="K", help="classes (default: 21)")
    add("--training", action="store_true", help="count a step, with all heads and the Border Network, not inference")
    add("--savings", action="store_true", help="count FastDFN's composed convolutions")
    add("--flops", type=float, default=H200.flops, metavar="X", help="operations a second (default: one H200, bf16)")
    add("--bandwidth", type=float, default=H200.bandwidth, metavar="X", help="bytes a second (default: one H200)")
    add("--element-size", type=int, default=2, metavar="N", help="bytes of a number (default: 2)")
    arguments = parser.parse_args(argv)
    network = network_of(arguments)
    machine = Machine(arguments.flops, arguments.bandwidth)
    print(table(network, machine, arguments.training, arguments.element_size))
    return 0


def network_of(arguments: argparse.Namespace) -> Network:
    height, width = arguments.size
    training = arguments.training
    return Network(
        batch=arguments.batch,
        height=height,
        width=width,
        num_classes=arguments.classes,
        backbone=arguments.backbone,
        border=training,
        one_head=not training,
        savings=arguments.savings,
    )


if __name__ == "__main__":
    cli.run(main)
