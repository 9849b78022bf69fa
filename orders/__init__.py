"""Generation orders and the group sizes that cut them into decoding steps."""

from orders.generate import ORDER_KINDS, generate_orders
from orders.schedule import group_sizes, published_group_sizes

__all__ = ["ORDER_KINDS", "generate_orders", "group_sizes", "published_group_sizes"]
