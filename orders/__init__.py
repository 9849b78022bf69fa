"""Generation orders, and the group sizes that cut them into decoding steps."""

from orders.baselines import natural_group_sizes
from orders.draw import ORDER_KINDS, default_repulsion, generate_orders
from orders.files import load_orders, read_schedules, save_orders
from orders.schedule import group_sizes, parse_group_sizes, published_group_sizes

__all__ = [
    "ORDER_KINDS",
    "default_repulsion",
    "generate_orders",
    "group_sizes",
    "load_orders",
    "natural_group_sizes",
    "parse_group_sizes",
    "published_group_sizes",
    "read_schedules",
    "save_orders",
]
