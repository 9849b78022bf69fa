"""Modules of shapes only take the weights of a file as they are."""

from __future__ import annotations

import torch

from models import build_model
from models.lpd import LPD, load_weights
from util.shapes import shapes_only


def test_weights_are_taken_and_nothing_else_is_made() -> None:
    trained = build_model("lpd_debug", img_size=16, stride=4, class_num=3, vocab_size=12)
    before = torch.get_rng_state()
    with shapes_only():
        model = LPD(trained.config)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.is_meta and parameter.requires_grad for parameter in model.parameters())
    state = trained.state_dict() | {"fake_latent": trained.fake_latent.detach().double()}
    load_weights(model, state, "the file")
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in trained.state_dict().items())
    assert {value.dtype for value in loaded.values()} == {torch.float32}
    assert not torch.equal(LPD(trained.config).pos_embed, trained.pos_embed)  # outside of the block as ever
