"""``python -m orders``: files of orders, pictures of schedules and their statistics."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from orders.draw import ORDER_KINDS, OrderSettings, default_repulsion
from orders.files import check_suffix, load_orders, read_settings, write_orders
from orders.schedule import default_steps, grid_group_sizes, grid_shape, parse_group_sizes
from orders.statistics import order_statistics
from util.cli import exit_on_user_error
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


def _settings(args: argparse.Namespace, kind: str) -> OrderSettings:
    grid = _grid(args)
    if args.group_sizes is None:
        sizes = grid_group_sizes(grid, default_steps(grid) if args.steps is None else args.steps)
    else:
        sizes = parse_group_sizes(args.group_sizes, grid[0] * grid[1])
    repulsion = default_repulsion(grid) if args.repulsion_threshold is None else args.repulsion_threshold
    return OrderSettings(kind, grid, sizes, args.proximity_threshold, repulsion, args.seed)


def generate(args: argparse.Namespace) -> None:
    """Write a file of orders."""
    check_suffix(args.output)
    if args.num < 1:
        raise UserError(f"--num {args.num} must be at least 1.")
    settings = _settings(args, args.order)
    chunks = settings.chunks(np.arange(args.num), device=args.device, workers=args.workers)
    with tqdm(total=args.num, unit=" orders", desc=args.output.name) as bar:

        def counted() -> Iterator[np.ndarray]:
            for chunk in chunks:
                yield chunk
                bar.update(len(chunk))

        write_orders(args.output, counted(), (args.num, settings.grid[0] * settings.grid[1]), settings)


def convert(args: argparse.Namespace) -> None:
    """Check every row of a file of orders and write it in the other form."""
    check_suffix(args.output)
    orders = load_orders(args.input, _grid(args))
    write_orders(args.output, iter([orders]), orders.shape, read_settings(args.input))
    print(f"{args.output}: {len(orders)} orders of {orders.shape[1]} tokens")


def stats(args: argparse.Namespace) -> None:
    """Print what each step of a schedule knows and how far apart its tokens are."""
    if args.num < 1:
        raise UserError(f"--num {args.num} must be at least 1.")
    settings = _settings(args, args.order)
    if args.file is None:
        orders = np.concatenate(list(settings.chunks(np.arange(args.num))))
    else:
        orders = load_orders(args.file, settings.grid, settings.group_sizes)[: args.num]
    measured = order_statistics(orders, settings.group_sizes, settings.grid, settings.repulsion_threshold)
    h, w = settings.grid
    print(
        f"{args.file or args.order}: {h}×{w} tokens, {len(settings.group_sizes)} steps, {len(orders)} orders\n"
        "near context: share of a group's tokens with a known token among their 8 neighbours\n"
        "proximity: sum of 1/distance over these known neighbours\n"
        f"close pairs: share of a group's pairs within Chebyshev distance {settings.repulsion_threshold}\n"
        "nearest: Euclidean distance to the nearest other token of the group\n"
        f"{'step':>6}{'tokens':>8}{'near context':>14}{'proximity':>11}{'close pairs':>13}{'nearest':>9}"
    )
    for step, (size, *means) in enumerate(zip(settings.group_sizes, *vars(measured).values(), strict=True), 1):
        print(f"{step:>6}{size:>8}" + _format(*means))
    print(f"{'2-':>5}{len(settings.group_sizes)}{'':>8}" + _format(*measured.overall().values()))


def _format(near: float, proximity: float, close: float, nearest: float) -> str:
    text = f"{near:>14.4f}{proximity:>11.3f}{close:>13.4f}{nearest:>9.2f}"
    return text.replace("nan", "  –")


def draw(args: argparse.Namespace) -> None:
    """Draw the step of each token of one order."""
    from orders.figures import Schedule, draw_schedule

    _check_picture(args.output, ".png", ".pdf", ".svg")
    draw_schedule(args.output, Schedule.of(_settings(args, args.order), args.index))


def compare(args: argparse.Namespace) -> None:
    """Draw several schedules with the same group sizes beside each other."""
    from orders.figures import Schedule, draw_comparison

    _check_picture(args.output, ".png", ".pdf", ".svg")
    schedules, overall = [], []
    for kind in args.orders:
        settings = _settings(args, kind)
        schedules.append(Schedule.of(settings, args.index))
        orders = np.concatenate(list(settings.chunks(np.arange(400))))
        overall.append(
            order_statistics(orders, settings.group_sizes, settings.grid, settings.repulsion_threshold).overall()
        )
    draw_comparison(args.output, schedules, overall)


def animate(args: argparse.Namespace) -> None:
    """Write a GIF of grids that fill up."""
    from orders.figures import Schedule, animate

    _check_picture(args.output, ".gif")
    animate(args.output, [Schedule.of(_settings(args, kind), args.index) for kind in args.orders])


def _check_picture(path: Path, *suffixes: str) -> None:
    if path.suffix not in suffixes:
        raise UserError(f"picture {path} must end in {', '.join(suffixes)}.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m orders", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    grid = argparse.ArgumentParser(add_help=False)
    grid.add_argument("--img_size", type=int, default=256, help="side of a square image in pixels (default: 256)")
    grid.add_argument("--stride", type=int, default=16, help="pixels per token (default: 16)")
    grid.add_argument("--grid", help="tokens instead: a side such as 16, or rows and columns such as 16x24")

    schedule = argparse.ArgumentParser(add_help=False, parents=[grid])
    add = schedule.add_argument
    add("--steps", type=int, help="decoding steps (default: 20 for 16×16 tokens, 48 for 32×32, else L / 12.8)")
    add("--group_sizes", help="tokens per step instead: '1,3,5', '[1, 3, 5]', 'uniform:STEPS', or a file with a list")
    add("--proximity_threshold", type=float, default=1.0, help="proximity that makes a cell a candidate (default: 1)")
    add("--repulsion_threshold", type=int, help="distance that the cells of a group keep (default: grid side / 8)")
    add("--seed", type=int, default=0)

    one = argparse.ArgumentParser(add_help=False)
    one.add_argument("--order", choices=ORDER_KINDS, default="lpd")

    def command(name: str, run: Callable[[argparse.Namespace], None], *parents: argparse.ArgumentParser) -> Callable:
        added = commands.add_parser(name, parents=parents, help=run.__doc__, description=run.__doc__)
        added.set_defaults(run=run)
        return added.add_argument

    add = command("generate", generate, schedule, one)
    add("output", type=Path, help=".json (the published form) or .safetensors (smaller, loads at once)")
    add("--num", type=int, default=60_000, help="number of orders (default: 60000)")
    add("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    add("--workers", type=int, help="CPU threads (default: one per core)")

    add = command("convert", convert, grid)
    add("input", type=Path, help=".json or .safetensors")
    add("output", type=Path, help=".json or .safetensors")

    add = command("stats", stats, schedule, one)
    add("--num", type=int, default=400, help="number of orders to measure (default: 400)")
    add("--file", type=Path, help="measure the orders of this file instead of drawing them")

    add = command("draw", draw, schedule, one)
    add("output", type=Path, help=".png, .pdf or .svg")
    add("--index", type=int, default=0, help="number of the order (default: 0)")

    add = command("compare", compare, schedule)
    add("output", type=Path, help=".png, .pdf or .svg")
    add("--orders", nargs="+", choices=ORDER_KINDS, default=_COMPARED, help="(default: all)")
    add("--index", type=int, default=0, help="number of the order (default: 0)")

    add = command("animate", animate, schedule)
    add("output", type=Path, help=".gif")
    add("--orders", nargs="+", choices=ORDER_KINDS, default=_ANIMATED, help=f"(default: {' '.join(_ANIMATED)})")
    add("--index", type=int, default=0, help="number of the order (default: 0)")
    return parser


def main() -> None:
    args = _parser().parse_args()
    args.run(args)


if __name__ == "__main__":
    exit_on_user_error(main)
