"""One training step: draws, forward, loss, backward, clipping, optimizer; and what of it a checkpoint holds.

Shape legend: `B` samples of this process, `L` tokens of an image.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from engine.training.batch import Part
from engine.training.config import TrainConfig
from engine.training.optim import EMA, build_adamw, full_tensor, load_optimizer
from models.block import Block
from models.loss import linear_cross_entropy
from models.lpd import LPD, LPDConfig
from util.dist import Dist
from util.errors import UserError
from util.shapes import shapes_only

logger = logging.getLogger(__name__)

FLEX_BLOCK = 128


def why_no_flex(config: LPDConfig, device: torch.device) -> str | None:
    """Why a model cannot be trained with FlexAttention on a device; None if it can."""
    if device.type == "cpu":
        return "torch has no backward pass of it on a CPU"
    if config.attn_dropout > 0:
        return f"it has no dropout, and --attn_dropout is {config.attn_dropout}"
    if config.num_tokens % FLEX_BLOCK:
        return f"it works on blocks of {FLEX_BLOCK} rows, and the model has {config.num_tokens} tokens per image"
    if config.embed_dim // config.num_heads < 16:
        return f"it needs heads of at least 16 channels, and the model's have {config.embed_dim // config.num_heads}"
    return None


def choose_attention(wanted: str, config: LPDConfig, device: torch.device) -> str:
    """The attention that "auto", "sdpa" or "flex" stands for: "flex" where it can be used, else "sdpa".

    Raises:
        UserError: where "flex" is asked for and cannot be used.
    """
    reason = why_no_flex(config, device)
    if wanted == "flex" and reason is not None:
        raise UserError(f"--attention flex cannot be used: {reason}; use --attention sdpa.")
    return "sdpa" if wanted == "sdpa" or reason is not None else "flex"


class TrainingPass(nn.Module):
    """The loss of a part as a module's forward, which is what DDP and FSDP wrap."""

    def __init__(self, model: LPD, attention: str, fused: bool) -> None:
        super().__init__()
        self.model, self.attention, self.fused = model, attention, fused

    def forward(
        self,
        tokens: torch.Tensor,
        labels: torch.Tensor,
        orders: torch.Tensor,
        label_drop: torch.Tensor,
        group_sizes: Sequence[int],
    ) -> torch.Tensor:
        """Mean cross-entropy over all tokens."""
        features = self.model.features(tokens, labels, orders, group_sizes, label_drop, attention=self.attention)
        targets = tokens.gather(1, orders)
        return linear_cross_entropy(features.flatten(0, 1), self.model.head.weight, targets.flatten(), fused=self.fused)


class TrainStep:
    """Weights, optimizer and moving average of a run on one process or many; called once per step.

    Args:
        model: on `dist.device`, with the same weights on every process. With `config.fsdp` its parameters are sharded
            over the processes (FSDP2, a group of parameters per block), gradients and optimizer too.
        config: with `config.compile` the blocks and the loss are compiled during the step; everywhere else the model
            stays as it is.

    Raises:
        UserError: for `fsdp` in a single process, and from :func:`choose_attention`.
    """

    def __init__(self, model: LPD, config: TrainConfig, dist: Dist) -> None:
        if config.fsdp and dist.world_size == 1:
            raise UserError("--fsdp shards the model over processes, but there is only one; start it with torchrun.")
        self.model, self.config, self.dist = model, config, dist
        compiled = dist.device.type == "cuda" if config.compile is None else config.compile
        attention = choose_attention(config.attention, model.config, dist.device)
        self.net: nn.Module = TrainingPass(model, attention, compiled)
        if config.fsdp:
            shard(self.net, model.blocks, dist)
        elif dist.world_size > 1:
            ids = [dist.device.index] if dist.device.type == "cuda" else None
            self.net = DistributedDataParallel(self.net, device_ids=ids, gradient_as_bucket_view=True)
        # One function for all blocks, so that it is compiled for two of them: the last attends queries only.
        self._block = torch.compile(Block.forward, dynamic=False) if compiled else None
        self.optimizer = build_adamw(model, config.weight_decay)
        self.ema = EMA(model, config.ema) if config.ema else None

    def __call__(
        self, parts: Iterable[Part], group_sizes: Sequence[int], lr: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One step over this process's share of the global batch; nothing is read back from the device.

        Args:
            parts: `grad_accum` parts of equal size.

        Returns:
            (loss, norm) on the device: mean loss of this process's samples; gradient norm over all, before clipping.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        losses = []
        with self._compiled_blocks():
            for index, part in enumerate(parts, start=1):
                with self._synchronized(last=index == self.config.grad_accum):
                    with torch.autocast(self.dist.device.type, torch.bfloat16, enabled=self.config.bf16):
                        loss = self.net(*part, group_sizes) / self.config.grad_accum
                    loss.backward()
                losses.append(loss.detach())
        assert len(losses) == self.config.grad_accum  # or processes would not have met
        parameters = list(self.model.parameters())
        norm = full_tensor(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        torch.nn.utils.clip_grads_with_norm_(parameters, self.config.grad_clip, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update()
        return torch.stack(losses).sum(), norm

    def _synchronized(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """DDP averages gradients in the last part only; FSDP in each, since it never holds a whole gradient."""
        if isinstance(self.net, DistributedDataParallel) and not last:
            return self.net.no_sync()
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def _compiled_blocks(self) -> Iterator[None]:
        """Compiled code behind the blocks' forward; hooks (FSDP's, checkpointing's) stay outside of it."""
        if self._block is None:
            yield
            return
        # DDP would cut the graph of a large block by its bucket size; gradients come block by block without that.
        with torch._dynamo.config.patch(optimize_ddp=False):
            for block in self.model.blocks:
                block.__dict__["forward"] = partial(self._block, cast(Block, block))
            try:
                yield
            finally:
                for block in self.model.blocks:
                    del block.__dict__["forward"]

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of the step: complete plain tensors, which the next step may change.

        `model` and `model_ema` (if there is one) are state dicts with the released names, `optimizer` is AdamW's. To be
        called on all processes; with FSDP only rank 0 gets something, on the host.
        """
        state: dict[str, Any] = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.ema is not None:
            state["model_ema"] = self.ema.average
        if not self.config.fsdp:
            return state
        state = {name: self._gather(value) for name, value in state.items()}
        return state if self.dist.is_main else {}

    def _gather(self, value: Any) -> Any:
        """The same nested data with complete tensors on the host of rank 0, one after the other."""
        if isinstance(value, dict):
            return {key: self._gather(item) for key, item in value.items()}
        if not isinstance(value, torch.Tensor):
            return value
        tensor = full_tensor(value.detach())
        return tensor.cpu() if self.dist.is_main else None

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Resume from what :meth:`state` gave; the model's weights are loaded already."""
        load_optimizer(self.optimizer, checkpoint["optimizer"])
        if self.ema is not None and "model_ema" in checkpoint:
            self.ema.load(checkpoint["model_ema"])
        elif self.ema is not None:
            logger.warning("the checkpoint holds no moving average of the weights; it starts now, from its weights")
        elif "model_ema" in checkpoint:
            logger.warning("the moving average of the weights ends here: --ema is off, though the checkpoint holds one")

    def evaluation_model(self) -> LPD:
        """The model to evaluate and to draw samples with: the moving average if there is one, never sharded.

        To be called on all processes.
        """
        if self.ema is None and not self.config.fsdp:
            return self.model
        state = self.model.state_dict() if self.ema is None else self.ema.average
        with shapes_only():
            model = LPD(self.model.config)
        model.load_state_dict({name: full_tensor(value.detach()) for name, value in state.items()}, assign=True)
        return model.requires_grad_(False)


def shard(net: nn.Module, blocks: nn.ModuleList, dist: Dist) -> None:
    """FSDP2 in place, a group of parameters per block and one for the rest.

    Weights are gathered and gradients reduced in float32, and autocast narrows as it does without FSDP: same numbers.
    """
    mesh = init_device_mesh(dist.device.type, (dist.world_size,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
