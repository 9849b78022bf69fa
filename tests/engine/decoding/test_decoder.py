"""Prepared decoding: every path gives the plain loop's codes, for any mix of decoders, and refuses what it can't do."""

from __future__ import annotations

import gc
import itertools
import logging
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import engine.decoding.decoder
import models.inference
from engine.decoding.decoder import Decoder
from engine.decoding.loop import draw_codes, make_cache
from engine.generate import generate
from models import build_model
from models.inference import CPU_PACKINGS, can_pack, narrow_copy, packed_copy
from models.lpd import LPD
from models.sampling import Sampling
from tests.helpers.tiny_models import far_from_initialisation, tiny_tokenizer
from tokenizers import VQModel
from util.errors import UserError
from util.pictures import to_uint8

V, CLASSES, SIZES = 50, 5, [1, 3, 5, 7]


def small_model() -> LPD:
    torch.manual_seed(0)
    model = build_model("lpd_debug", img_size=16, stride=4, class_num=CLASSES, vocab_size=V).eval()
    return far_from_initialisation(model, std=0.4)


def small_model_for_kernels() -> LPD:
    """Of sizes that own kernels can decode."""
    torch.manual_seed(0)
    sizes = {"embed_dim": 64, "num_heads": 2, "vocab_size": 64}
    model = build_model("lpd_debug", img_size=16, stride=4, class_num=CLASSES, **sizes).eval()
    return far_from_initialisation(model, std=0.2)


def small_tokenizer() -> VQModel:
    torch.manual_seed(1)
    return tiny_tokenizer(4, V)


def batch(size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Labels, orders and seeds."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (size,), generator=generator)
    return labels, torch.rand(size, 16, generator=generator).argsort(dim=1), torch.arange(size) + 100 * seed


def plain_codes(model: LPD, inputs: tuple[torch.Tensor, ...], sizes: list[int], sampling: Sampling) -> torch.Tensor:
    labels, orders, seeds = inputs
    return generate(model, labels, orders, sizes, cfg=sampling.cfg, top_k=sampling.top_k, seeds=seeds)


GUIDED, UNGUIDED = Sampling(cfg=3.0), Sampling(top_k=7)


@pytest.mark.parametrize(
    ("path", "sampling"),
    [
        ("plain", GUIDED),
        ("plain", UNGUIDED),
        ("packed", GUIDED),
        ("auto", UNGUIDED),
        pytest.param("compiled", GUIDED, marks=pytest.mark.slow),  # a C++ compiler runs
    ],
)
def test_codes_are_those_of_the_plain_loop(path: str, sampling: Sampling) -> None:
    """Catches static buffers that keep the last batch, wrong guidance halves, and noise of another step."""
    model = small_model()
    decoder = Decoder(model, SIZES, sampling, 3, path=path)
    for seed in range(2):
        inputs = batch(3, seed)
        assert torch.equal(decoder(*inputs).codes, plain_codes(model, inputs, SIZES, sampling))


def test_decoders_live_side_by_side() -> None:
    """Interleaved calls of decoders with other schedules and batch sizes must not share a cache or a buffer."""
    model, guided = small_model(), Sampling(cfg=2.0)
    cases = [(SIZES, 3, guided), ([4, 12], 2, Sampling()), ([1] * 16, 3, guided)]
    decoders = [Decoder(model, sizes, sampling, B) for sizes, B, sampling in cases]
    for seed in range(2):
        for decoder, (sizes, B, sampling) in zip(decoders, cases, strict=True):
            inputs = batch(B, seed)
            assert torch.equal(decoder(*inputs).codes, plain_codes(model, inputs, sizes, sampling))


def test_pictures_are_the_decoded_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the batch is decoded in pieces, the last one smaller."""
    tokenizer = small_tokenizer()
    monkeypatch.setattr(engine.decoding.decoder, "_PIXELS_AT_ONCE", 2 * 16 * 16)
    codes, images = Decoder(small_model(), SIZES, Sampling(), 3, tokenizer=tokenizer)(*batch(3))
    with torch.no_grad():
        expected = to_uint8(tokenizer.decode(codes))
    assert images is not None
    assert images.shape == (3, 16, 16, 3)
    assert (images.int() - expected.int()).abs().max() <= 1  # a byte at a rounding edge


def test_without_class() -> None:
    model, (_, orders, seeds) = small_model(), batch(2)
    decoder = Decoder(model, SIZES, Sampling(), 2, with_class=False)
    assert torch.equal(decoder(None, orders, seeds).codes, generate(model, None, orders, SIZES, seeds=seeds))


@pytest.mark.parametrize(("weights", "tolerance"), [("float32", 1e-5), ("float16", 2e-3), ("int8", 0.15)])
def test_packed_weights_change_outputs_by_their_rounding(weights: str, tolerance: float) -> None:
    """Relative to the spread of the logits; the model it was made from stays as it was."""
    torch.manual_seed(0)
    model = build_model("lpd_debug", img_size=64, class_num=CLASSES, vocab_size=V).eval()
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter)
    inputs = torch.randint(V, (2, 16)), torch.tensor([0, 3]), torch.arange(16).repeat(2, 1), SIZES
    with torch.no_grad():
        expected = model(*inputs)
        logits = packed_copy(model, weights)(*inputs)
        assert torch.equal(model(*inputs), expected)
    assert (logits - expected).abs().max() < tolerance * expected.std()


def test_packed_bfloat16_is_autocast_to_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the head, whose float32 factors bring it closer to float32. Norms and residual stream are float32."""
    monkeypatch.setattr(models.inference, "_cpu_has", lambda instructions: True)  # others emulate them
    torch.manual_seed(0)
    model, inputs = small_model(), batch(3)
    torch.nn.init.normal_(model.head.weight)
    decoders = [
        Decoder(model, SIZES, Sampling(cfg=3.0), 3, path=path, bf16=bf16)
        for path, bf16 in (("plain", False), ("plain", True), ("packed_bfloat16", True), ("packed_bfloat16", False))
    ]
    normed = []
    for norm in (module for module in decoders[2].model.modules() if isinstance(module, torch.nn.LayerNorm)):
        norm.register_forward_hook(lambda module, inputs, output: normed.extend([inputs[0].dtype, output.dtype]))
    exact, autocast, packed, implied = (recorded_logits(decoder, inputs) for decoder in decoders)
    assert set(normed) == {torch.float32}
    assert packed.dtype == torch.float32
    assert torch.equal(packed, implied)
    assert 0 < (packed - autocast).std() < 0.005 * exact.std()
    assert 0 < (packed - exact).std() < (autocast - exact).std()


def test_bf16_of_a_cpu_is_packed_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for has, path in ((True, "packed_bfloat16"), (False, "plain")):
        monkeypatch.setattr(models.inference, "_cpu_has", lambda instructions, has=has: has)
        assert Decoder(small_model(), SIZES, Sampling(), 2, bf16=True).path == path
    with pytest.raises(UserError, match=r"bfloat16 weights cannot be packed here.*AVX-512 BF16 or AMX"):
        Decoder(small_model(), SIZES, Sampling(), 2, path="packed_bfloat16")


def test_packed_int8_sums_do_not_overflow() -> None:
    """Two products of the largest numbers overflow 16 bits on processors whose instructions add pairs."""
    if not can_pack("int8"):
        pytest.skip("no FBGEMM")
    weight, x = torch.ones(64, 256), torch.cat([torch.full((4, 255), 1.0), torch.full((4, 1), -1.0)], dim=1)
    found = CPU_PACKINGS["int8"].pack(weight, None)(x)
    torch.testing.assert_close(found, torch.full((4, 64), 254.0), rtol=0.02, atol=0)


def test_weights_cast_once_are_those_autocast_casts() -> None:
    """Norms or the residual stream in bfloat16 would show here."""
    model = small_model()
    inputs = torch.randint(V, (2, 16)), torch.tensor([0, 3]), torch.arange(16).repeat(2, 1), SIZES
    twin = narrow_copy(model)
    assert model.head.weight.dtype == torch.float32
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(twin(*inputs), model(*inputs))


def test_a_failure_in_the_middle_leaves_nothing_switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = small_model(), batch(3)
    decoder = Decoder(model, SIZES, Sampling(cfg=3.0), 3, path="plain", bf16=True)
    expected = decoder(*inputs).codes
    calls = iter(range(2))

    def failing(*arguments: Any) -> torch.Tensor:
        if next(calls, None) is None:
            raise RuntimeError("in the middle")
        return draw(*arguments)

    draw = decoder._draw
    monkeypatch.setattr(decoder, "_draw", failing)
    with pytest.raises(RuntimeError, match="in the middle"):
        decoder(*inputs)
    assert not torch.is_inference_mode_enabled()
    assert not torch.is_autocast_enabled("cpu")
    assert torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.undo()
    assert torch.equal(decoder(*inputs).codes, expected)


class Casts(TorchDispatchMode):
    """Counts conversions of float32 tensors with these shapes."""

    def __init__(self, shapes: set[torch.Size]) -> None:
        super().__init__()
        self.shapes, self.count = shapes, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        given = args[0] if args else None
        if isinstance(given, torch.Tensor) and given.dtype == torch.float32 and given.shape in self.shapes:
            self.count += isinstance(result, torch.Tensor) and result.dtype != given.dtype
        return result


@pytest.mark.parametrize("prepared", [True, False])
def test_autocast_does_not_cast_weights_at_every_step(prepared: bool) -> None:
    """In inference mode it keeps none of its casts."""
    model, (labels, orders, seeds) = small_model(), batch(3)
    linear = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    decoder = Decoder(model, SIZES, GUIDED, 3, path="plain", bf16=True)
    with Casts({weight.shape for weight in linear}) as casts:
        if prepared:
            decoder(labels, orders, seeds)
        else:
            with torch.autocast("cpu", torch.bfloat16):
                codes = generate(model, labels, orders, SIZES, cfg=3.0, seeds=seeds)
    assert casts.count == (0 if prepared else len(linear))
    if not prepared:
        assert torch.equal(codes, decoder(labels, orders, seeds).codes)


def _descend(model: LPD, fused: bool) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    model(torch.zeros(1, 16, dtype=torch.int64), None, torch.arange(16)[None], SIZES).sum().backward()
    optimizer.step()


def _replace_head(model: LPD) -> None:
    model.head.weight = torch.nn.Parameter(model.head.weight.detach().clone())


@pytest.mark.parametrize("path", ["plain", "packed"])
@pytest.mark.parametrize(
    "change",
    [
        lambda model: _descend(model, fused=False),
        lambda model: _descend(model, fused=True),  # which torch does not count as a change
        lambda model: model.load_state_dict(small_model().state_dict()),
        _replace_head,
    ],
)
def test_changed_weights_are_refused(change: Callable[[LPD], Any], path: str) -> None:
    """Copies of old weights would be mixed with new norms and embeddings."""
    model, inputs = small_model(), batch(2)
    decoder = Decoder(model, SIZES, Sampling(), 2, path=path)
    decoder(*inputs)
    change(model)
    with pytest.raises(UserError, match="the model's weights have changed"):
        decoder(*inputs)
    Decoder(model, SIZES, Sampling(), 2, path=path)(*inputs)


def test_weights_that_are_not_counted_or_gone_are_no_obstacle() -> None:
    with torch.inference_mode():
        model = small_model()
    inputs = batch(2)
    expected = plain_codes(model, inputs, SIZES, Sampling())
    decoder, seen = Decoder(model, SIZES, Sampling(), 2, path="packed"), weakref.ref(model.head.weight)
    assert torch.equal(decoder(*inputs).codes, expected)
    del model
    assert seen() is None  # what was copied is not kept alive
    assert torch.equal(decoder(*inputs).codes, expected)


def test_threads_share_a_decoder() -> None:
    model = small_model()
    decoder, inputs = Decoder(model, SIZES, Sampling(), 2, path="plain"), [batch(2, seed) for seed in range(8)]
    expected = [plain_codes(model, x, SIZES, Sampling()) for x in inputs] * 5
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda x: decoder(*x).codes, inputs * 5))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_auto_says_what_failed_and_takes_the_next_path(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A GPU that cannot capture, and a compiler that fails: there are pictures all the same, and nothing is kept."""
    model, inputs, failed = small_model(), batch(2), []

    make = Decoder._make

    def out_of_memory(decoder: Decoder, model: LPD, tokenizer: VQModel | None) -> None:
        if decoder.path == "plain":
            return make(decoder, model, tokenizer)
        decoder.cache = make_cache(model, 2)
        failed.append(weakref.ref(decoder.cache.key_values))
        raise torch.OutOfMemoryError("at 3:20:\n\ntoo little\n")

    monkeypatch.setattr(engine.decoding.decoder, "resolve_path", lambda *given: "graph")
    monkeypatch.setattr(engine.decoding.decoder, "has_own_kernels", lambda *given: True)
    monkeypatch.setattr(Decoder, "_make", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        Decoder(model, SIZES, Sampling(), 2, path="graph")
    failed.clear()
    with caplog.at_level(logging.WARNING):
        decoder = Decoder(model, SIZES, Sampling(), 2)
    monkeypatch.undo()
    assert decoder.path == "plain"
    assert [record.getMessage() for record in caplog.records] == [
        f"decode path {path} cannot be prepared (OutOfMemoryError: at 3:20: … too little); taking {other}, which is "
        f"slower; --decode_path {path} shows all of the error"
        for path, other in itertools.pairwise(("graph", "graph_library", "compiled", "plain"))
    ]
    assert [reference() for reference in failed] == [None] * 3
    assert torch.equal(decoder(*inputs).codes, plain_codes(model, inputs, SIZES, Sampling()))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"path": "quick"}, "decode path 'quick' does not exist"),
        ({"path": "graph"}, "graph needs a CUDA GPU"),
        ({"path": "graph_float8"}, "graph_float8 needs a CUDA GPU"),
        ({"path": "packed", "bf16": True}, "packed does not go with bf16"),
        ({"path": "packed", "model": small_model().double()}, "packed is for float32 models"),
        ({"batch_size": 0}, "batch size 0"),
        ({"group_sizes": [1, 14]}, "sum to 15"),
        ({"sampling": Sampling(cfg=2.0), "with_class": False}, "no labels"),
    ],
)
def test_what_cannot_be_prepared_is_named(options: dict[str, Any], named: str) -> None:
    values: dict[str, Any] = {"model": small_model(), "group_sizes": SIZES, "sampling": Sampling(), "batch_size": 2}
    with pytest.raises(UserError, match=named):
        Decoder(**(values | options))


def test_another_batch_is_refused() -> None:
    """What a graph was not captured for must not be replayed on, nor a label without a class be embedded."""
    decoder = Decoder(small_model(), SIZES, Sampling(), 2)
    labels, orders, seeds = batch(3)
    with pytest.raises(UserError, match=r"\(3, 16\).*\(2, 16\)"):
        decoder(labels, orders, seeds)
    with pytest.raises(UserError, match=r"seeds have shape \(1,\)"):
        decoder(labels[:2], orders[:2], seeds[:1])
    with pytest.raises(UserError, match="without class"):
        decoder(None, orders[:2], seeds[:2])
    with pytest.raises(UserError, match="label 9"):
        decoder(labels[:2] + 9 - labels[0], orders[:2], seeds[:2])
    with pytest.raises(UserError, match="not a permutation"):
        decoder(labels[:2], orders[:2] * 0, seeds[:2])


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["plain", "compiled", "graph_library"])
def test_gpu_paths_give_the_codes_of_the_cpu(path: str) -> None:
    """In float64 rounding changes nothing; two decoders side by side, each replayed on several batches."""
    model, tokenizer, sampling = small_model().double(), small_tokenizer().double(), Sampling(cfg=3.0)
    inputs = [batch(3, seed) for seed in range(3)]
    expected = [[plain_codes(model, x, sizes, sampling) for x in inputs] for sizes in (SIZES, [4, 12])]
    model, tokenizer = model.cuda(), tokenizer.cuda()
    decoders = [Decoder(model, sizes, sampling, 3, tokenizer=tokenizer, path=path) for sizes in (SIZES, [4, 12])]
    nodes = [decoder.graph_nodes() or 0 for decoder in decoders]  # of many steps and of few
    assert nodes[0] > nodes[1] > 0 if path == "graph_library" else nodes == [0, 0]
    for i, x in enumerate(inputs):
        for decoder, codes in zip(decoders, expected, strict=True):
            found, images = decoder(*x)
            assert torch.equal(found.cpu(), codes[i])
            assert images is not None
            with torch.no_grad():
                torch.testing.assert_close(images, to_uint8(tokenizer.decode(found.clone())), atol=1, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["plain", "compiled", "graph_library", "graph"])
def test_gpu_never_waits_from_labels_to_pixels(path: str) -> None:
    model, tokenizer = small_model_for_kernels().cuda(), tiny_tokenizer(4, 64).cuda()
    decoder = Decoder(model, SIZES, Sampling(cfg=3.0), 3, tokenizer=tokenizer, path=path, bf16=True)
    assert decoder.path == path
    inputs = [tensor.cuda() for tensor in batch(3)]
    decoder(*inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        decoder(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def recorded_logits(decoder: Decoder, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Logits (G, L, V) of all steps. What is drawn is fixed, so that paths can be compared to the end."""
    logits = []

    def record(logits_GNV: torch.Tensor, weights: torch.Tensor, keys_BN: torch.Tensor, *rest: Any) -> torch.Tensor:
        logits.append(logits_GNV)
        return keys_BN % V

    decoder._draw, decoder.graph = record, None  # what was captured runs launch by launch
    decoder(*inputs)
    return torch.cat(logits, dim=1)


@pytest.mark.gpu
@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-4), (True, 0.05)])
def test_gpu_logits_of_the_compiled_pieces_are_those_of_the_plain_loop(bf16: bool, tolerance: float) -> None:
    model, inputs = small_model().cuda(), batch(8)
    plain, compiled = (
        recorded_logits(Decoder(model, SIZES, Sampling(cfg=3.0), 8, path=path, bf16=bf16), inputs)
        for path in ("plain", "compiled")
    )
    assert plain.dtype == compiled.dtype == torch.float32
    assert (plain - compiled).abs().max() < tolerance * plain.std()


@pytest.mark.gpu
@pytest.mark.parametrize(("path", "allowed"), [("graph", 1.25), ("graph_float8", 15.0)])
@pytest.mark.parametrize("size", [1, 20])  # with 20 images the library takes the longer steps
def test_gpu_logits_of_own_kernels_are_as_exact_as_those_of_autocast(path: str, allowed: float, size: int) -> None:
    """By relative error to float32, as a multiple of the plain loop's in bfloat16; and the same again."""
    model, inputs, sampling = small_model_for_kernels().cuda(), batch(size), Sampling(cfg=3.0)
    exact = recorded_logits(Decoder(model, SIZES, sampling, size, path="plain"), inputs)
    plain = recorded_logits(Decoder(model, SIZES, sampling, size, path="plain", bf16=True), inputs)
    decoder = Decoder(model, SIZES, sampling, size, path=path, bf16=True)
    own = recorded_logits(decoder, inputs)
    assert decoder.path == path
    assert (own - exact).norm() < allowed * (plain - exact).norm()
    assert torch.equal(recorded_logits(decoder, inputs), own)


@pytest.mark.gpu
def test_gpu_failure_during_the_capture_leaves_nothing_switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model, stream = small_model().cuda(), torch.cuda.current_stream()

    def reads_back(*arguments: Any) -> torch.Tensor:
        codes = draw_codes(*arguments)
        if torch.cuda.is_current_stream_capturing():
            codes.sum().item()
        return codes

    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(engine.decoding.decoder, "draw_codes", reads_back)
    with pytest.raises(RuntimeError):
        Decoder(model, SIZES, Sampling(cfg=3.0), 3, path="graph_library")
    monkeypatch.undo()
    assert torch.cuda.current_stream() == stream
    assert not torch.cuda.is_current_stream_capturing()
    assert not torch.is_inference_mode_enabled()
    inputs = batch(3)
    decoder = Decoder(model, SIZES, Sampling(cfg=3.0), 3, path="graph_library")
    assert torch.equal(decoder(*inputs).codes, plain_codes(model, inputs, SIZES, Sampling(cfg=3.0)).cuda())


@pytest.mark.gpu
def test_gpu_capture_that_fails_leaves_pictures_and_no_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, sampling, inputs = small_model().cuda(), Sampling(cfg=3.0), batch(3)
    Decoder(model, SIZES, sampling, 3, path="graph_library")(*inputs)  # what stays for the process is there now

    def memory_of(path: str) -> tuple[int, Decoder]:
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        decoder = Decoder(model, SIZES, sampling, 3, path=path)
        return torch.cuda.memory_allocated() - before, decoder

    expected, _ = memory_of("compiled")
    make = Decoder._make

    def fail_in_the_end(decoder: Decoder, *arguments: Any) -> None:
        make(decoder, *arguments)
        if decoder.path == "graph_library":
            raise RuntimeError("not on this GPU")

    monkeypatch.setattr(Decoder, "_make", fail_in_the_end)
    found, decoder = memory_of("auto")
    assert decoder.path == "compiled"
    assert "not on this GPU" in caplog.text
    assert found == expected
    assert torch.equal(decoder(*inputs).codes.cpu(), plain_codes(model, inputs, SIZES, sampling).cpu())


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["plain", "compiled", "graph_library"])
def test_gpu_streams_share_a_decoder_and_inputs_are_the_callers_again(path: str) -> None:
    """Behind work that delays the first stream, the second call must not overtake; pinned inputs are overwritten."""
    model, sampling = small_model().double().cuda(), Sampling(cfg=3.0)
    decoder, streams = Decoder(model, SIZES, sampling, 3, path=path), [torch.cuda.Stream() for _ in range(2)]
    expected = [plain_codes(model, batch(3, seed), SIZES, sampling) for seed in range(4)]
    torch.cuda.synchronize()
    found = []
    for seed in range(4):
        inputs = [tensor.pin_memory() for tensor in batch(3, seed)]
        with torch.cuda.stream(streams[seed % 2]):
            if seed % 2 == 0:
                torch.cuda._sleep(20_000_000)
            found.append(decoder(*inputs).codes)
        for tensor in inputs:
            tensor.zero_()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.gpu
def test_gpu_dropped_decoders_leave_no_memory() -> None:
    """Each capture on a stream of its own would leave a workspace of the matrix library."""
    model, left = small_model().cuda(), []
    for _ in range(4):
        Decoder(model, SIZES, Sampling(cfg=3.0), 3, path="graph_library")
        gc.collect()
        torch.cuda.empty_cache()
        left.append(torch.cuda.memory_allocated())
    assert left[1] == left[-1]
