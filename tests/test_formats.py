"""Layout arithmetic against pages really laid out, sealing and release against a sequence stepped token by token."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.errors import BudgetError, KVFoldError, UnsupportedError
from kvfold.formats import (
    PageFormat,
    VectorFormat,
    block_counts,
    first_live,
    format_bytes,
    parse_bytes,
    sealed_until,
    sink_blocks,
)

quantized = st.builds(
    VectorFormat,
    dim=st.integers(1, 300),
    bits=st.sampled_from([2, 4, 8]),
    quantized=st.just(True),
    group=st.integers(1, 300),
    rotation=st.sampled_from(["hadamard", "none"]),
)
by_channel = quantized.map(lambda fmt: replace(fmt, scales="channel"))
raw = st.builds(VectorFormat.raw, st.integers(1, 300), st.sampled_from([1, 2, 4]))
vectors = st.one_of(quantized, by_channel, raw)


def pack(codes, fmt):
    """Codes ``[stored_dim]`` to bytes, byte j holding dims j, j + D'/n, ... from low bits to high."""
    per = 8 // fmt.bits
    width = fmt.stored_dim // per
    out = np.zeros(width, np.uint8)
    for dim, code in enumerate(codes):
        out[dim % width] |= np.uint8(code << (dim // width * fmt.bits))
    return out


def unpack(data, fmt):
    mask = 2**fmt.bits - 1
    return np.concatenate([(data >> shift) & mask for shift in range(0, 8, fmt.bits)])


@given(quantized, st.randoms(use_true_random=False))
def test_codes_fill_exactly_their_bytes(fmt, random):
    codes = np.array([random.randrange(2**fmt.bits) for _ in range(fmt.stored_dim)])
    data = pack(codes, fmt)
    assert data.nbytes == fmt.code_bytes
    assert (unpack(data, fmt) == codes).all()


@given(quantized)
def test_groups_cover_the_dims_evenly(fmt):
    assert fmt.groups * fmt.group_width == fmt.stored_dim >= fmt.dim
    assert fmt.groups == -(-fmt.dim // min(fmt.group, fmt.dim))
    assert fmt.stored_dim - fmt.dim < fmt.groups * 8 // fmt.bits
    assert fmt.meta_bytes == fmt.groups * 2 * 2
    if fmt.dim % (fmt.groups * 8 // fmt.bits) == 0:
        assert fmt.stored_dim == fmt.dim


@given(by_channel, st.integers(1, 130))
def test_scales_of_channels_are_the_pages(fmt, block_size):
    """A scale and a zero for each stored dim, however many tokens there are; a token has none."""
    assert (fmt.movable, fmt.groups, fmt.meta_bytes, fmt.token_bytes) == (False, 1, 0, fmt.code_bytes)
    assert fmt.group_width == fmt.stored_dim >= fmt.dim
    assert fmt.page_meta_bytes(block_size) == 2 * 2 * fmt.stored_dim
    page = PageFormat(block_size, fmt, replace(fmt, scales="token"))
    assert not page.movable
    assert PageFormat(block_size, page.v, page.v).movable


@given(raw)
def test_raw_is_the_dtype_and_nothing_else(fmt):
    assert (fmt.groups, fmt.meta_bytes) == (0, 0)
    assert fmt.token_bytes == fmt.dim * fmt.bits // 8


@given(st.integers(1, 130), vectors, vectors)
def test_page_regions_hold_their_tokens_and_do_not_overlap(block_size, k, v):
    page = PageFormat(block_size, k, v)
    owner = np.full(page.page_bytes, -1)
    regions = [
        (page.k_codes_offset, block_size * k.code_bytes),
        (page.k_meta_offset, k.page_meta_bytes(block_size)),
        (page.v_codes_offset, block_size * v.code_bytes),
        (page.v_meta_offset, v.page_meta_bytes(block_size)),
    ]
    for number, (offset, size) in enumerate(regions):
        assert offset % 16 == 0
        region = owner[offset : offset + size]
        assert region.size == size
        assert (region == -1).all()
        region[:] = number
    assert page.page_bytes % 64 == 0
    used = sum(size for _, size in regions)
    assert used <= page.page_bytes < used + 4 * 16 + 64


def test_known_pages():
    int4 = VectorFormat(128, 4, True, 128, "hadamard")
    assert PageFormat(32, int4, int4).page_bytes == 32 * 2 * (64 + 4)
    half = VectorFormat.raw(128, 2)
    assert PageFormat(32, half, half).page_bytes == 32 * 2 * 256
    assert VectorFormat(80, 4, True, 64, "none").group_width == 40
    # 64 tokens of 64 channels: as many scales either way.
    token = VectorFormat(64, 4, True, 128, "hadamard")
    assert PageFormat(64, replace(token, scales="channel"), token).page_bytes == PageFormat(64, token, token).page_bytes


@pytest.mark.parametrize(
    "bad",
    [
        (0, 4, True, 8, "none"),
        (8, 3, True, 8, "none"),
        (8, 4, False, 8, "none"),
        (8, 4, True, 0, "none"),
        (8, 4, True, 8, "x"),
        (8, 4, True, 8, "none", "page"),
        (8, 16, False, 8, "none", "channel"),
    ],
)
def test_bad_vector_formats_are_refused(bad):
    with pytest.raises(ValueError, match=r"must be|is no|unknown"):
        VectorFormat(*bad)


def test_a_page_needs_a_token():
    with pytest.raises(ValueError, match="block_size"):
        PageFormat(0, VectorFormat.raw(8, 2), VectorFormat.raw(8, 2))


def can_read(position, query, kind, window):
    """Whether a query may attend to a position, by the definition of the layer kind."""
    if kind == "sliding":
        return query - window < position <= query
    if kind == "chunked":
        return position // window == query // window
    return position <= query


def step_by_step(tokens, *, block_size, kind, window, sinks, recent, packs):
    """Yields (length, states) after each token; states: live block -> "raw" or "packed"."""
    states = {}
    for length in range(1, tokens + 1):
        block = (length - 1) // block_size
        states.setdefault(block, "raw")
        for i in list(states):
            positions = range(i * block_size, (i + 1) * block_size)
            whole = positions[-1] < length
            if packs and whole and positions[0] >= sinks and positions[-1] < length - recent:
                states[i] = "packed"
            future = range(length, length + block_size + 1)  # a window only moves on
            if whole and not any(can_read(p, q, kind, window) for q in future for p in positions):
                del states[i]
        yield length, dict(states)


lives = st.fixed_dictionaries(
    {
        "block_size": st.integers(1, 9),
        "kind": st.sampled_from(["full", "sliding", "chunked", "latent"]),
        "window": st.integers(1, 40),
        "sinks": st.integers(0, 20),
        "recent": st.integers(0, 40),
        "packs": st.booleans(),
    }
)


@settings(deadline=None)
@given(lives, st.integers(1, 90))
def test_sealing_and_release_equal_a_sequence_stepped_token_by_token(life, tokens):
    size, kind, window = life["block_size"], life["kind"], life["window"]
    last = sink_blocks(life["sinks"], size)
    for length, states in step_by_step(tokens, **life):
        sealed = range(sink_blocks(life["sinks"], size), sealed_until(length, size, life["sinks"], life["recent"]))
        start = first_live(length, size, kind, window)
        blocks = range(start, -(-length // size))
        assert list(states) == list(blocks)
        assert [i for i in blocks if states[i] == "packed"] == [i for i in sealed if i >= start and life["packs"]]
        counts = block_counts(length, **life)
        assert counts == (list(states.values()).count("raw"), list(states.values()).count("packed"))
        assert last <= sealed.stop
        last = sealed.stop


def test_errors_read_what_why_and_hint():
    assert str(KVFoldError("pool")) == "pool"
    assert str(KVFoldError("pool", why="too small", hint="double it")) == "pool: too small\nhint: double it"
    many = UnsupportedError("model x", ["it sees", "it hears"])
    assert (many.reasons, str(many)) == (["it sees", "it hears"], "model x: it sees; it hears")
    one = UnsupportedError("model x", why="it sees", hint="close its eyes")
    assert (one.reasons, one.why) == (["it sees"], "it sees")
    copy = pickle.loads(pickle.dumps(one))
    assert (str(copy), copy.reasons, copy.hint) == (str(one), one.reasons, one.hint)


def test_no_window_releases_nothing():
    assert first_live(1000, 32, "full", None) == first_live(1000, 32, "sliding", None) == 0


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GiB", 2 << 30),
        ("512MiB", 512 << 20),
        ("1.5GB", 1_500_000_000),
        (" 3 kib ", 3072),
        (".5KB", 500),
        ("1TB", 10**12),
        ("7", 7),
        ("7b", 7),
        ("0.1B", 0),
        (12, 12),
        ("0", 0),
    ],
)
def test_sizes_are_read(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "2 gigs", "1e9", "1,5GB", "2GiB 3", -1, None, True, 1.5, "٣GiB"])
def test_bad_sizes_are_refused_by_name(text):
    with pytest.raises(BudgetError, match="bad size") as caught:
        parse_bytes(text)
    assert str(text) in str(caught.value)


@given(st.integers(0, 2**50))
def test_written_sizes_read_back(n):
    text = format_bytes(n)
    back = parse_bytes(text)
    assert back == n or abs(back - n) <= n * 0.005


def test_sizes_for_people():
    assert [format_bytes(n) for n in (0, 1023, 1024, 1536, 2 << 30)] == ["0 B", "1023 B", "1 KiB", "1.50 KiB", "2 GiB"]
