"""``python -m orders``: files of orders, figures of orders and their statistics."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

from orders.draw import ORDER_KINDS, OrderSpec, default_repulsion
from orders.files import check_suffix, load_orders, read_spec, save_orders
from orders.schedule import default_steps, grid_group_sizes, grid_shape, parse_group_sizes
from orders.statistics import order_statistics
from util.cli import Parser, exit_on_user_error
from util.errors import UserError

_COMPARED = ("lpd", "lpd_near_only", "lpd_far_only", "random", "halton", "par", "raster", "zipar", "nar")
_ANIMATED = ("lpd", "random", "nar")


def _grid(args: argparse.Namespace) -> tuple[int, int]:
    if args.grid is None:
        if args.stride < 1 or args.img_size < 1 or args.img_size % args.stride:
            raise UserError(f"--img_size {args.img_size} must be a positive multiple of --stride {args.stride}.")
        return grid_shape(args.img_size // args.stride)
    sides = args.grid.lower().replace("×", "x").split("x")
    if not 1 <= len(sides) <= 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise UserError(f"--grid {args.grid!r} must be a side such as 16, or rows and columns such as 16x24.")
    return int(sides[0]), int(sides[-1])


def _spec(args: argparse.Namespace, kind: str) -> OrderSpec:
    grid = _grid(args)
    if args.group_sizes is None:
        sizes = grid_group_sizes(grid, default_steps(grid) if args.steps is None else args.steps)
    else:
        sizes = parse_group_sizes(args.group_sizes, grid[0] * grid[1])
    repulsion = default_repulsion(grid) if args.repulsion_threshold is None else args.repulsion_threshold
    return OrderSpec(kind, grid, sizes, args.proximity_threshold, repulsion, args.seed)


def _numbers(args: argparse.Namespace) -> np.ndarray:
    if args.num < 1:
        raise UserError(f"--num {args.num} must be at least 1.")
    return np.arange(args.num)


def generate(args: argparse.Namespace) -> None:
    """Write a file of orders."""
    check_suffix(args.output)
    spec = _spec(args, args.order)
    orders = spec.draw(_numbers(args), device=args.device, workers=args.workers, progress=True)
    save_orders(args.output, orders, spec)


def convert(args: argparse.Namespace) -> None:
    """Check every row of a file of orders and write it in the other form."""
    check_suffix(args.output)
    orders = load_orders(args.input, _grid(args))
    save_orders(args.output, orders, read_spec(args.input))
    print(f"{args.output}: {len(orders)} orders of {orders.shape[1]} tokens")


def stats(args: argparse.Namespace) -> None:
    """Print what each step of an order knows and how far apart its tokens are."""
    spec, numbers = _spec(args, args.order), _numbers(args)
    loaded = None if args.file is None else load_orders(args.file, spec.grid, spec.group_sizes)
    orders = spec.draw(numbers) if loaded is None else loaded[: len(numbers)]
    measured = order_statistics(orders, spec.group_sizes, spec.grid, spec.repulsion_threshold)
    h, w = spec.grid
    print(
        f"{args.file or args.order}: {h}×{w} tokens, {len(spec.group_sizes)} steps, {len(orders)} orders\n"
        "near context: share of a group's tokens with a known token among their 8 neighbours\n"
        "proximity: sum of 1/distance over these known neighbours\n"
        f"close pairs: share of a group's pairs within Chebyshev distance {spec.repulsion_threshold}\n"
        "nearest: Euclidean distance to the nearest other token of the group\n"
        f"{'step':>6}{'tokens':>8}{'near context':>14}{'proximity':>11}{'close pairs':>13}{'nearest':>9}"
    )
    for step, (size, *means) in enumerate(zip(spec.group_sizes, *vars(measured).values(), strict=True), 1):
        print(f"{step:>6}{size:>8}" + _format(*means))
    print(f"{'2-':>5}{len(spec.group_sizes)}{'':>8}" + _format(*measured.overall().values()))


def _format(near: float, proximity: float, close: float, nearest: float) -> str:
    text = f"{near:>14.4f}{proximity:>11.3f}{close:>13.4f}{nearest:>9.2f}"
    return text.replace("nan", "  –")


def draw(args: argparse.Namespace) -> None:
    """Draw the step of each token of one order."""
    from orders.figures import SteppedOrder, draw_order

    _check_figure(args.output, ".png", ".pdf", ".svg")
    draw_order(args.output, SteppedOrder.of(_spec(args, args.order), args.index))


def compare(args: argparse.Namespace) -> None:
    """Draw several orders with the same group sizes beside each other."""
    from orders.figures import SteppedOrder, draw_comparison

    _check_figure(args.output, ".png", ".pdf", ".svg")
    specs = [_spec(args, kind) for kind in args.orders]
    overall = [
        order_statistics(spec.draw(np.arange(400)), spec.group_sizes, spec.grid, spec.repulsion_threshold).overall()
        for spec in specs
    ]
    draw_comparison(args.output, [SteppedOrder.of(spec, args.index) for spec in specs], overall)


def animate(args: argparse.Namespace) -> None:
    """Write a GIF of grids that fill up."""
    from orders.figures import SteppedOrder, animate

    _check_figure(args.output, ".gif")
    animate(args.output, [SteppedOrder.of(_spec(args, kind), args.index) for kind in args.orders])


def _check_figure(path: Path, *suffixes: str) -> None:
    if path.suffix not in suffixes:
        raise UserError(f"figure {path} must end in {', '.join(suffixes)}.")


def _parser() -> Parser:
    parser = Parser(prog="python -m orders", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    grid = Parser(add_help=False)
    grid.add_argument("--img_size", type=int, default=256, help="side of a square image in pixels")
    grid.add_argument("--stride", type=int, default=16, help="pixels per token")
    grid.add_argument("--grid", help="tokens instead: a side such as 16, or rows and columns such as 16x24")

    spec = Parser(add_help=False, parents=[grid])
    add = spec.add_argument
    add("--steps", type=int, help="decoding steps (default: 20 for 16×16 tokens, 48 for 32×32, else L / 12.8)")
    add("--group_sizes", help="tokens per step instead: '1,3,5', '[1]*2+[7]*2', 'uniform:STEPS', or a file with a list")
    add("--proximity_threshold", type=float, default=1.0, help="proximity that makes a cell a candidate")
    add("--repulsion_threshold", type=int, help="distance that the cells of a group keep (default: grid side / 8)")
    add("--seed", type=int, default=0, help="what the random numbers follow from")

    order = Parser(add_help=False)
    order.add_argument("--order", choices=ORDER_KINDS, default="lpd", help="the kind of order")

    index = Parser(add_help=False)
    index.add_argument("--index", type=int, default=0, help="number of the order")

    def command(name: str, run: Callable[[argparse.Namespace], None], *parents: Parser) -> Callable:
        added = commands.add_parser(name, parents=parents, help=run.__doc__, description=run.__doc__)
        added.set_defaults(run=run)
        return added.add_argument

    add = command("generate", generate, spec, order)
    add("output", type=Path, help=".json (the published form) or .safetensors (smaller, loads at once)")
    add("--num", type=int, default=60_000, help="number of orders")
    add("--device", default="cpu", help="cpu, cuda or cuda:N")
    add("--workers", type=int, help="CPU threads (default: one per core)")

    add = command("convert", convert, grid)
    add("input", type=Path, help=".json or .safetensors")
    add("output", type=Path, help=".json or .safetensors")

    add = command("stats", stats, spec, order)
    add("--num", type=int, default=400, help="number of orders to measure")
    add("--file", type=Path, help="measure the orders of this file instead of drawing them")

    add = command("draw", draw, spec, order, index)
    add("output", type=Path, help=".png, .pdf or .svg")

    add = command("compare", compare, spec, index)
    add("output", type=Path, help=".png, .pdf or .svg")
    add("--orders", nargs="+", choices=ORDER_KINDS, default=_COMPARED, help="(default: all)")

    add = command("animate", animate, spec, index)
    add("output", type=Path, help=".gif")
    add("--orders", nargs="+", choices=ORDER_KINDS, default=_ANIMATED, help=f"(default: {' '.join(_ANIMATED)})")
    return parser


def main() -> None:
    args = _parser().parse_args()
    args.run(args)


if __name__ == "__main__":
    exit_on_user_error(main)
