"""``python -m orders``: files of orders, figures of orders and their statistics."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np

from orders.config import OrderConfig, Orders
from orders.draw import ORDER_KINDS
from orders.files import load_orders, read_spec, save_orders
from orders.schedule import default_steps, grid_shape, grid_side
from orders.statistics import order_statistics
from util.cli import Parser, exit_on_user_error, from_args, path_ending_in
from util.errors import UserError
from util.files import check_output_file
from util.plots import SUFFIXES

_COMPARED = (
    *("lpd", "lpd_near_only", "lpd_far_only", "random", "halton"),
    *("checkerboard", "par", "raster", "zipar", "nar"),
)
_ANIMATED = ("lpd", "random", "nar")


def _grid(args: argparse.Namespace) -> tuple[int, int]:
    return args.grid or grid_shape(grid_side(args.img_size, args.stride))


def _orders(args: argparse.Namespace, **given: str) -> Orders:
    grid = _grid(args)
    if args.generation_steps is None:
        args.generation_steps = default_steps(grid)
    return from_args(OrderConfig, args, **given).for_grid(grid, args.seed)


def _numbers(args: argparse.Namespace) -> np.ndarray:
    if args.num < 1:
        raise UserError(f"--num {args.num} must be at least 1.")
    return np.arange(args.num)


def generate(args: argparse.Namespace) -> None:
    """Write a file of orders."""
    spec = _orders(args).spec
    orders = spec.draw(_numbers(args), device=args.device, workers=args.workers, progress=True)
    save_orders(args.output, orders, spec)


def convert(args: argparse.Namespace) -> None:
    """Check every row of a file of orders and write it in the other form."""
    orders = load_orders(args.input, _grid(args))
    save_orders(args.output, orders, read_spec(args.input))
    print(f"{args.output}: {len(orders)} orders of {orders.shape[1]} tokens")


def stats(args: argparse.Namespace) -> None:
    """Print what each step of an order knows and how far apart its tokens are."""
    described, numbers = _orders(args), _numbers(args)
    spec = described.spec
    orders = spec.draw(numbers) if described.rows is None else described.rows[: len(numbers)]
    measured = order_statistics(orders, spec.group_sizes, spec.grid, spec.largest_repulsion)
    h, w = spec.grid
    print(
        f"{args.lpd_order_file or args.order}: {h}×{w} tokens, {len(spec.group_sizes)} steps, {len(orders)} orders\n"
        "near context: share of a group's tokens with a known token among their 8 neighbours\n"
        "proximity: sum of 1/distance over these known neighbours\n"
        f"close pairs: share of a group's pairs within Chebyshev distance {spec.largest_repulsion}\n"
        "nearest: Euclidean distance to the nearest other token of the group\n"
        f"{'step':>6}{'tokens':>8}{'near context':>14}{'proximity':>11}{'close pairs':>13}{'nearest':>9}"
    )
    per_step = zip(range(1, len(spec.group_sizes) + 1), spec.group_sizes, *vars(measured).values(), strict=True)
    for row in (*per_step, (f"2-{len(spec.group_sizes)}", "", *measured.overall().values())):
        print("{:>6}{:>8}{:>14.4f}{:>11.3f}{:>13.4f}{:>9.2f}".format(*row).replace("nan", "  –"))


def _stepped(args: argparse.Namespace, **given: str) -> Any:
    from orders import figures  # loads matplotlib

    spec = _orders(args, **given).spec
    return figures.SteppedOrder(spec, spec.draw(np.array([args.index]))[0])


def draw(args: argparse.Namespace) -> None:
    """Draw the step of each token of one order."""
    from orders import figures  # loads matplotlib

    figures.draw_order(args.output, _stepped(args))


def compare(args: argparse.Namespace) -> None:
    """Draw several orders with the same group sizes beside each other."""
    from orders import figures  # loads matplotlib

    figures.draw_comparison(args.output, [_stepped(args, order=kind) for kind in args.orders])


def animate(args: argparse.Namespace) -> None:
    """Write a GIF of grids that fill up."""
    from orders import figures  # loads matplotlib

    figures.animate(args.output, [_stepped(args, order=kind) for kind in args.orders])


def grid(text: str) -> tuple[int, int]:
    """Rows and columns: ``16`` or ``16x24``."""
    rows, _, columns = text.lower().replace("×", "x").partition("x")
    return grid_shape((int(rows), int(columns or rows)))


def _parser() -> Parser:
    parser = Parser(prog="python -m orders", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    size = Parser(add_help=False)
    size.add_argument("--img_size", type=int, default=256, help="side of a square image in pixels")
    size.add_argument("--stride", type=int, default=16, help="pixels per token")
    size.add_argument("--grid", type=grid, help="tokens instead: a side such as 16, or rows and columns such as 16x24")

    spec = Parser(add_help=False, parents=[size])
    steps = "decoding steps (default: 20 for 16×16 tokens, 48 for 32×32, else L / 12.8)"
    spec.add_argument("--steps", dest="generation_steps", metavar="STEPS", type=int, help=steps)
    spec.add_config(OrderConfig, skip=("generation_steps", "order", "lpd_order_file", "schedule_file"))
    spec.add_argument("--seed", type=int, default=0, help="what the random numbers follow from")

    def command(run: Callable[[argparse.Namespace], None], parent: Parser, *flags: str) -> Callable:
        added = commands.add_parser(run.__name__, parents=[parent], help=run.__doc__, description=run.__doc__)
        added.set_defaults(run=run)
        if "order" in flags:
            added.add_argument("--order", choices=ORDER_KINDS, default="lpd", help="the kind of order")
        if "index" in flags:
            added.add_argument("--index", type=int, default=0, help="number of the order")
        return added.add_argument

    orders_file, picture = path_ending_in(".json", ".safetensors"), path_ending_in(*SUFFIXES)
    add = command(generate, spec, "order")
    add("output", type=orders_file, help=".json (the published form) or .safetensors (smaller, loads at once)")
    add("--num", type=int, default=60_000, help="number of orders")
    add("--device", default="cpu", help="cpu, cuda or cuda:N")
    add("--workers", type=int, help="CPU threads (default: one per core)")

    add = command(convert, size)
    add("input", type=orders_file, help=".json or .safetensors")
    add("output", type=orders_file, help=".json or .safetensors")

    add = command(stats, spec, "order")
    add("--num", type=int, default=400, help="number of orders to measure")
    add("--file", dest="lpd_order_file", metavar="FILE", type=orders_file, help="measure its orders instead")

    command(draw, spec, "order", "index")("output", type=picture, help=".png, .pdf or .svg")

    add = command(compare, spec, "index")
    add("output", type=picture, help=".png, .pdf or .svg")
    add("--orders", nargs="+", choices=ORDER_KINDS, default=_COMPARED, help="(default: all)")

    add = command(animate, spec, "index")
    add("output", type=path_ending_in(".gif"), help=".gif")
    add("--orders", nargs="+", choices=ORDER_KINDS, default=_ANIMATED, help=f"(default: {' '.join(_ANIMATED)})")
    return parser


def main() -> None:
    args = _parser().parse_args()
    if "output" in args:
        check_output_file(args.output)
    args.run(args)


if __name__ == "__main__":
    exit_on_user_error(main)
