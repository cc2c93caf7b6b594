"""The codecs alone: rotations are orthogonal, the affine code keeps its law, packing is the stated layout."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvfold.codecs import affine, channels
from kvfold.codecs.packing import unpack_codes
from kvfold.codecs.rotation import Rotation, hadamard_matrix
from kvfold.formats import VectorFormat

quick = settings(max_examples=80, deadline=None)
dtypes = st.sampled_from((torch.bfloat16, torch.float16, torch.float32))

# Half a unit in the last place, relative to the value, and the smallest step around zero.
ROUNDING = {torch.bfloat16: (2.0**-8, 2.0**-133), torch.float16: (2.0**-11, 2.0**-24), torch.float32: (2.0**-23, 0.0)}


@st.composite
def formats(draw, bits=(2, 4, 8)):
    dim = draw(st.integers(1, 80) | st.sampled_from((96, 128, 192, 256)))
    return VectorFormat(
        dim=dim,
        bits=draw(st.sampled_from(bits)),
        quantized=True,
        group=draw(st.integers(1, 80) | st.just(128)),
        rotation=draw(st.sampled_from(("hadamard", "none"))),
    )


@st.composite
def rows(draw, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A few rows of very different sizes and offsets, some constant, some with one outlying dim."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    count = draw(st.integers(1, 9))
    x = torch.randn(count, dim, generator=generator)
    x *= 10.0 ** torch.randint(-4, 3, (count, 1), generator=generator)
    x += draw(st.sampled_from((0.0, 0.0, 1.0, -37.3, 300.0)))
    if draw(st.booleans()):
        x[0] = x[0, :1]
    if draw(st.booleans()):
        x[-1, draw(st.integers(0, dim - 1))] *= 50
    return x.to(dtype)


def bound(y: Tensor, meta: Tensor, fmt: VectorFormat, dtype: torch.dtype) -> Tensor:
    relative, absolute = ROUNDING[dtype]
    return affine.error_bound(meta, fmt) * (1 + 2.0**-12) + y.float().abs() * relative + absolute


@quick
@given(st.data(), formats(), dtypes, dtypes, st.booleans())
def test_error_bound_holds(data, fmt, source, target, inner):
    x = data.draw(rows(fmt.dim, source))
    codes, meta = affine.encode(x, fmt, inner=inner)
    y = affine.decode(codes, meta, fmt, target)
    assert y.shape == x.shape
    assert y.dtype == target
    assert bool(((x.float() - y.float()).abs() <= bound(y, meta, fmt, target)).all())


@quick
@given(st.data(), formats(), dtypes, dtypes, st.booleans())
def test_scales_of_channels_keep_the_law(data, fmt, source, target, inner):
    """Pages of any size and dim: the bound, the format's bytes, the documented layout to the bit."""
    fmt = replace(fmt, scales="channel")
    x = data.draw(rows(fmt.dim, source))
    x = torch.stack((x, x.flip(0) / 3))
    codes, meta = channels.encode(x, fmt, inner=inner)
    pages, size = x.shape[:2]
    assert (codes.shape, codes.dtype) == ((pages, size, fmt.code_bytes), torch.uint8)
    assert (meta.shape, meta.dtype) == ((pages, 2, fmt.stored_dim), torch.bfloat16)
    assert codes[0].nbytes == size * fmt.token_bytes
    assert meta[0].nbytes == fmt.page_meta_bytes(size)
    y = channels.decode(codes, meta, fmt, target)
    assert (y.shape, y.dtype) == (x.shape, target)
    relative, absolute = ROUNDING[target]
    room = channels.error_bound(meta, fmt) * (1 + 2.0**-12) + y.float().abs() * relative + absolute
    assert bool(((x.float() - y.float()).abs() <= room).all())
    steps = torch.full((pages, size, fmt.dim), -1.0, dtype=torch.float64)
    unpack_codes(codes, fmt.bits, steps)
    scale, zero = meta[..., : fmt.dim].double().split(1, dim=-2)
    assert torch.equal(y, (zero + scale * steps).float().to(target))


@quick
@given(st.data(), formats(), st.sampled_from((torch.nan, torch.inf, -torch.inf)))
def test_bad_numbers_stay_in_their_channel(data, fmt, bad):
    fmt = replace(fmt, scales="channel")
    x = data.draw(rows(fmt.dim))
    dim = data.draw(st.integers(0, fmt.dim - 1))
    poisoned = x.clone()
    poisoned[data.draw(st.integers(0, x.shape[0] - 1)), dim] = bad
    wanted, y = (channels.decode(*channels.encode(each, fmt), fmt, torch.float32) for each in (x, poisoned))
    others = torch.arange(fmt.dim) != dim
    assert bool(y[:, dim].isnan().all()), "hidden instead of seen"
    assert torch.equal(y[:, others], wanted[:, others])


def test_inner_levels_are_the_middles_of_equal_cells():
    fmt = VectorFormat(dim=8, bits=2, quantized=True, group=8, rotation="none")
    x = torch.tensor([[0.0, 1.0, 1.9, 2.1, 3.9, 4.1, 7.9, 8.0]])
    found = affine.decode(*affine.encode(x, fmt, inner=True), fmt, torch.float32)
    assert found.tolist() == [[1.0, 1.0, 1.0, 3.0, 3.0, 5.0, 7.0, 7.0]]
    whole = affine.encode(x, fmt)[1], affine.encode(x, fmt, inner=True)[1]
    assert float(whole[1][0, 0, 0]) < 0.76 * float(whole[0][0, 0, 0])


def test_scales_of_channels_tame_static_channels():
    """Offsets that every token has cost tokens their scale, channels nothing."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(64, 64, generator=generator) + 10 * torch.randn(64, generator=generator)
    token = VectorFormat(dim=64, bits=4, quantized=True, group=64, rotation="none")
    channel = replace(token, scales="channel")
    by_token = affine.decode(*affine.encode(x, token), token, torch.float32)
    by_channel = channels.decode(*channels.encode(x, channel), channel, torch.float32)
    assert float((by_channel - x).pow(2).mean()) < 0.02 * float((by_token - x).pow(2).mean())


@quick
@given(st.data(), formats())
def test_bytes_are_the_formats_bytes(data, fmt):
    x = data.draw(rows(fmt.dim))
    codes, meta = affine.encode(x, fmt)
    assert codes.dtype == torch.uint8
    assert meta.dtype == torch.bfloat16
    assert codes.shape == (*x.shape[:-1], fmt.code_bytes)
    assert meta.shape == (*x.shape[:-1], fmt.groups, 2)
    assert codes[0].nbytes + meta[0].nbytes == fmt.token_bytes


@quick
@given(st.data(), formats(), dtypes)
def test_layout_and_single_rounding(data, fmt, dtype):
    """Decoded, by hand from the documented layout, in float64 and rounded once: the same bits. Strided output too."""
    codes, meta = affine.encode(data.draw(rows(fmt.dim)), fmt)
    plane = fmt.code_bytes
    by_hand = torch.empty(codes.shape[0], fmt.dim, dtype=torch.float64)
    for j in range(fmt.dim):
        code = (codes[:, j % plane].int() >> (j // plane * fmt.bits)) & (2**fmt.bits - 1)
        scale, zero = meta[:, j // fmt.group_width].double().unbind(-1)
        by_hand[:, j] = zero + scale * code
    # Via float32, as computed: float64 to bfloat16 at once could differ in a tie.
    by_hand = by_hand.float().to(dtype)
    assert torch.equal(affine.decode(codes, meta, fmt, dtype), by_hand)
    wide = torch.full((codes.shape[0], fmt.dim + 3), torch.nan, dtype=dtype)
    affine.unpack_into(codes, meta, fmt, wide[:, 1:-2])
    assert torch.equal(wide[:, 1:-2], by_hand)
    assert bool(wide[:, [0, -2, -1]].isnan().all())


@quick
@given(st.data(), formats())
def test_encoding_again_never_widens(data, fmt):
    first = affine.encode(data.draw(rows(fmt.dim)), fmt)
    again = affine.encode(affine.decode(*first, fmt, torch.float32), fmt)
    real = -(-fmt.dim // fmt.group_width)  # groups past these hold padding alone
    (scale, zero), (scale_again, zero_again) = (meta[..., :real, :].float().unbind(-1) for _, meta in (first, again))
    exact = zero.abs() < 2**16 * scale
    assert bool((scale_again <= scale)[exact].all())
    assert bool((zero_again >= zero)[exact].all())
    if fmt.bits < 8:
        steps, steps_again = (unpacked(codes, fmt) for codes, _ in (first, again))
        for group, (mine, mine_again) in enumerate(zip(split(steps, fmt), split(steps_again, fmt), strict=True)):
            same = exact[:, group] & (mine.amin(-1) == 0)
            assert torch.equal(mine[same], mine_again[same])
            assert torch.equal(first[1][same, group], again[1][same, group])


def unpacked(codes: Tensor, fmt: VectorFormat) -> Tensor:
    steps = torch.full((codes.shape[0], fmt.dim), -1.0)
    unpack_codes(codes, fmt.bits, steps)
    return steps


def split(x: Tensor, fmt: VectorFormat) -> tuple[Tensor, ...]:
    """The real dims, by group."""
    return x.split(fmt.group_width, dim=-1)


@quick
@given(st.data(), formats(), st.sampled_from((torch.nan, torch.inf, -torch.inf)))
def test_bad_numbers_stay_in_their_row(data, fmt, bad):
    x = data.draw(rows(fmt.dim))
    index = data.draw(st.integers(0, x.shape[0] - 1))
    dim = data.draw(st.integers(0, fmt.dim - 1))
    codes, meta = affine.encode(x, fmt)
    poisoned = x.clone()
    poisoned[index, dim] = bad
    codes_bad, meta_bad = affine.encode(poisoned, fmt)
    others = torch.arange(x.shape[0]) != index
    assert torch.equal(codes_bad[others], codes[others])
    assert torch.equal(meta_bad[others], meta[others])
    y = affine.decode(codes_bad, meta_bad, fmt, torch.float32)[index]
    group = dim // fmt.group_width
    mine = torch.arange(fmt.dim) // fmt.group_width == group
    assert bool(y[mine].isnan().all()), "hidden instead of seen"
    assert bool(y[~mine].isfinite().all())


def test_every_nan_is_seen():
    """Also those whose bits would overflow the integer arithmetic of the rounding."""
    fmt = VectorFormat(dim=8, bits=4, quantized=True, group=8, rotation="none")
    patterns = torch.tensor([0x7FFFFFFF, 0x7F800001, 0x7FC00000, -1, -0x7FFFFF, -0x400000], dtype=torch.int32)
    x = torch.zeros(6, 8)
    x[:, 3] = patterns.view(torch.float32)
    assert bool(affine.decode(*affine.encode(x, fmt), fmt, torch.bfloat16).isnan().all())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, 0.1, -3.14159, 1e-40, 6e-39, -2e-38, 3e38])
def test_constant_rows(bits, value):
    fmt = VectorFormat(dim=6, bits=bits, quantized=True, group=4, rotation="none")
    x = torch.full((2, 6), value)
    codes, meta = affine.encode(x, fmt)
    assert bool((meta[..., 0] > 0).all())
    y = affine.decode(codes, meta, fmt, torch.float32)
    assert bool(((x - y).abs() <= bound(y, meta, fmt, torch.float32)).all())
    assert bool(((x - y).abs() <= abs(value) * 2.0**-7 + 2.0**-126).all())


def test_no_rows():
    fmt = VectorFormat(dim=6, bits=4, quantized=True, group=4, rotation="none")
    codes, meta = affine.encode(torch.empty(0, 6), fmt)
    assert codes.shape == (0, fmt.code_bytes)
    assert affine.decode(codes, meta, fmt, torch.bfloat16).shape == (0, 6)


def test_padding_does_not_widen_a_row():
    fmt = VectorFormat(dim=5, bits=2, quantized=True, group=8, rotation="none")
    assert fmt.stored_dim > fmt.dim
    x = torch.tensor([[1000.0, 1000.5, 1001.0, 1000.25, 1001.5]])
    _, meta = affine.encode(x, fmt)
    alone = VectorFormat(dim=8, bits=2, quantized=True, group=8, rotation="none")
    _, meta_alone = affine.encode(torch.cat((x, x[:, :3]), 1), alone)
    assert torch.equal(meta, meta_alone)


def test_more_bits_are_never_worse():
    x = torch.randn(2000, 64, generator=torch.Generator().manual_seed(1))
    errors = []
    for bits in (8, 4, 2):
        fmt = VectorFormat(dim=64, bits=bits, quantized=True, group=64, rotation="none")
        errors.append(float((affine.decode(*affine.encode(x, fmt), fmt, torch.float32) - x).pow(2).mean()))
    assert errors[0] * 100 < errors[1]
    assert errors[1] * 10 < errors[2]


@quick
@given(st.integers(1, 80) | st.sampled_from((96, 128, 192, 256)))
def test_hadamard_is_orthogonal_and_its_own_inverse(dim):
    matrix = hadamard_matrix(dim, torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(dim, dtype=torch.float64))
    assert torch.equal(matrix, matrix.T)
    block = dim & -dim
    assert torch.equal(matrix.count_nonzero(0), torch.full((dim,), block))
    if block == 1:
        assert torch.equal(matrix, torch.eye(dim, dtype=torch.float64))


@quick
@given(formats(), dtypes, st.integers(0, 2**31))
def test_rotation_keeps_products_and_undoes(fmt, dtype, seed):
    rotation = Rotation(fmt)
    generator = torch.Generator().manual_seed(seed)
    assert rotation.is_identity == (fmt.rotation == "none" or fmt.dim % 2 == 1)
    q, k = (torch.randn(count, fmt.dim, generator=generator).to(dtype) for count in (4, 7))
    turned_q, turned_k = rotation.apply(q), rotation.apply(k)
    assert turned_q.dtype == dtype
    # Relative to the norms; a rotated row is rounded in each of its dims.
    room = 4 * ROUNDING[dtype][0] * float(q.float().norm(dim=-1).max() * k.float().norm(dim=-1).max()) + 1e-6
    exact, turned = q.double() @ k.double().T, turned_q.double() @ turned_k.double().T
    assert float((exact - turned).abs().max()) <= room
    back = rotation.undo(turned_k).float()
    assert float((back - k.float()).abs().max()) <= 4 * ROUNDING[dtype][0] * float(k.float().norm(dim=-1).max()) + 1e-6
    if rotation.is_identity:
        assert turned_q is q


def test_raw_format_is_not_rotated():
    assert Rotation(VectorFormat.raw(64, 2)).is_identity
    assert Rotation(VectorFormat(dim=64, bits=16, quantized=False, group=64, rotation="hadamard")).is_identity


def test_rotation_tames_an_outlying_dim():
    fmt = VectorFormat(dim=64, bits=4, quantized=True, group=64, rotation="hadamard")
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(3))
    x[:, 5] *= 40
    rotation = Rotation(fmt)
    plain = affine.decode(*affine.encode(x, fmt), fmt, torch.float32)
    turned = rotation.undo(affine.decode(*affine.encode(rotation.apply(x), fmt), fmt, torch.float32))
    assert float((turned - x).pow(2).mean()) < 0.5 * float((plain - x).pow(2).mean())


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("inner", [False, True])
def test_projected_codes_keep_the_projection_of_a_row(bits, inner):
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(bits)) + 1.5
    fmt = VectorFormat(dim=64, bits=bits, quantized=True, group=128, rotation="none")
    plain, kept = (
        affine.decode(*affine.encode(x, fmt, inner=inner, projected=projected), fmt, torch.float32)
        for projected in (False, True)
    )
    along = [((found * x).sum(-1) / x.square().sum(-1) - 1).abs().max() for found in (plain, kept)]
    assert along[1] < 2**-6  # scale and zero, which partly cancel, are each rounded to bfloat16
    assert along[1] < along[0]


def test_projection_leaves_rows_alone_that_have_none():
    fmt = VectorFormat(dim=8, bits=4, quantized=True, group=128, rotation="none")
    x = torch.tensor([[0.0] * 8, [1e30, -1e30, 1e30, 0, 0, 0, 0, 0], [5.0] * 8, [float("nan")] + [1.0] * 7])
    found = affine.decode(*affine.encode(x, fmt, projected=True), fmt, torch.float32)
    assert (found[0] == 0).all()
    assert found[1].isfinite().all()
    torch.testing.assert_close(found[2], x[2], rtol=2**-8, atol=0)
    assert found[3].isnan().all()
