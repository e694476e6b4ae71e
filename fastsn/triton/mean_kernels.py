"""The Triton kernels of the mean of a convolution. This file imports nothing but Triton.

A tile is ROWS x COLS elements of one sample, or of a map that all samples share: channels by
positions where POSITIONS_INNER, positions by channels otherwise, so that a row is contiguous.

Along one spatial dimension, tap k of the kernel meets position p where ``p * scale`` is one of
``begin + k * slope + {0, step, ..., span}``; see :class:`fastsn.triton.means.Axis`. Along other
dimensions it does so independently. There are always three dimensions, of size 1 if need be.

Sums are in a fixed order, so results depend on shapes, strides and types only.
"""

# mypy: disable-error-code="no-untyped-def, misc, valid-type"
import triton
import triton.language as tl

from fastsn.triton.common import i64, kernel, load_vector, only_if


@triton.jit
def along(p, scale, step):
    """Where positions lie along a dimension, and what is left of that after whole steps."""
    at = p * scale
    return at, at % step


@triton.jit
def meets(at, rest, k, begin, slope, step, span):
    """Whether tap ``k`` meets these positions of :func:`along`."""
    first = begin + k * slope
    own_rest = (first % step + step) % step  # % may be negative where `first` is
    return (at >= first) & (at <= first + span) & (rest == own_rest)


@kernel
def patch_sums(
    input: i64, parts, n_rows, n_cols, n_samples, samples, n_parts, total: i64,
    sample_stride: i64, row_stride: i64,
    size0, taps0, scale0, step0, begin0, slope0, span0,
    size1, taps1, scale1, step1, begin1, slope1, span1,
    size2, taps2, scale2, step2, begin2, slope2, span2,
    TYPE: tl.constexpr, ACC: tl.constexpr, POSITIONS_INNER: tl.constexpr, VECTOR: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """For a tile of ``samples`` samples, its part of what each tap meets: (channel, tap, part).

    Positions are counted through: a sample may be several of the batch one behind the other, of
    ``total`` positions in all. ``VECTOR`` elements lie side by side at a multiple of 16 bytes.
    """
    data = input.to(tl.pointer_type(TYPE), bitcast=True)
    if VECTOR > 1:
        # From these Triton works out that it can load 16 bytes at a time. A hint sticks to an
        # operation, not to an argument, which is why the address of the input is one.
        data = tl.multiple_of(data, 16)
        n_cols = n_cols // VECTOR * VECTOR
        sample_stride = sample_stride // VECTOR * VECTOR
        row_stride = row_stride // VECTOR * VECTOR
        if POSITIONS_INNER:
            total = total // VECTOR * VECTOR
    row_tiles = (n_rows + ROWS - 1) // ROWS
    col_tiles = (n_cols + COLS - 1) // COLS
    tile = tl.program_id(0) % (row_tiles * col_tiles)
    chunk = tl.program_id(0) // (row_tiles * col_tiles)
    row_tile = tile // col_tiles
    col_tile = tile % col_tiles
    row = row_tile * ROWS + tl.arange(0, ROWS)
    col = col_tile * COLS + tl.arange(0, COLS)
    offset = row.to(tl.int64)[:, None] * row_stride + col[None, :]
    in_tile = (row < n_rows)[:, None] & (col < n_cols)[None, :]
    position = col if POSITIONS_INNER else row
    counted = position[None, :] if POSITIONS_INNER else position[:, None]
    n_positions = (n_cols if POSITIONS_INNER else n_rows).to(tl.int64)
    sums = tl.zeros([ROWS, COLS], ACC)
    first = chunk * samples
    for n in range(first, tl.minimum(first + samples, n_samples)):
        mask = in_tile & (counted < total - n * n_positions)
        sums += tl.load(data + n * sample_stride + offset, mask=mask, other=0.0).to(ACC)

    channel = row if POSITIONS_INNER else col
    n_taps = taps0 * taps1 * taps2
    part = chunk * (col_tiles if POSITIONS_INNER else row_tiles)
    part += col_tile if POSITIONS_INNER else row_tile
    out = parts + channel.to(tl.int64) * n_taps * n_parts + part
    channels = channel < (n_rows if POSITIONS_INNER else n_cols)
    at0, rest0 = along(position // size2 // size1 % size0, scale0, step0)
    at1, rest1 = along(position // size2 % size1, scale1, step1)
    at2, rest2 = along(position % size2, scale2, step2)
    for k0 in range(taps0):
        met0 = meets(at0, rest0, k0, begin0, slope0, step0, span0)
        for k1 in range(taps1):
            met1 = met0 & meets(at1, rest1, k1, begin1, slope1, step1, span1)
            for k2 in range(taps2):
                met = met1 & meets(at2, rest2, k2, begin2, slope2, step2, span2)
                met = met[None, :] if POSITIONS_INNER else met[:, None]
                own = tl.sum(tl.where(met, sums, 0.0), axis=1 if POSITIONS_INNER else 0)
                tl.store(out, own, mask=channels)
                out += n_parts


@kernel
def patch_means(
    parts, result, n_results, n_parts, count: i64,
    ACC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The sums of all parts, divided by ``count``."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = parts + row.to(tl.int64)[:, None] * n_parts
    total = tl.zeros([ROWS, COLS], ACC)
    for start in range(0, n_parts, COLS):
        part = start + tl.arange(0, COLS)
        mask = (row < n_results)[:, None] & (part < n_parts)[None, :]
        total += tl.load(first + part[None, :], mask=mask, other=0.0)
    tl.store(result + row, tl.sum(total, axis=1) / count.to(ACC), mask=row < n_results)


@kernel
def patch_gradient(
    grad, result, n_rows, n_cols, count: i64,
    size0, taps0, scale0, step0, begin0, slope0, span0,
    size1, taps1, scale1, step1, begin1, slope1, span1,
    size2, taps2, scale2, step2, begin2, slope2, span2,
    TYPE: tl.constexpr, ACC: tl.constexpr, POSITIONS_INNER: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """For a tile of the map, the sum of the gradients of all taps that meet it, by ``count``."""
    col_tiles = (n_cols + COLS - 1) // COLS
    row = tl.program_id(0) // col_tiles * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(0) % col_tiles * COLS + tl.arange(0, COLS)
    position = col if POSITIONS_INNER else row
    channel = row if POSITIONS_INNER else col
    channels = channel < (n_rows if POSITIONS_INNER else n_cols)
    own = grad + channel.to(tl.int64) * (taps0 * taps1 * taps2)
    at0, rest0 = along(position // size2 // size1, scale0, step0)
    at1, rest1 = along(position // size2 % size1, scale1, step1)
    at2, rest2 = along(position % size2, scale2, step2)
    total = tl.zeros([ROWS, COLS], ACC)
    for k0 in range(taps0):
        met0 = meets(at0, rest0, k0, begin0, slope0, step0, span0)
        for k1 in range(taps1):
            met1 = met0 & meets(at1, rest1, k1, begin1, slope1, step1, span1)
            for k2 in range(taps2):
                met = met1 & meets(at2, rest2, k2, begin2, slope2, step2, span2)
                g = tl.load(own, mask=channels, other=0.0)
                met = met[None, :] if POSITIONS_INNER else met[:, None]
                g = g[:, None] if POSITIONS_INNER else g[None, :]
                total += tl.where(met, g, 0.0)
                own += 1
    out = result + row.to(tl.int64)[:, None] * n_cols + col[None, :]
    mask = (row < n_rows)[:, None] & (col < n_cols)[None, :]
    tl.store(out, (total / count.to(ACC)).to(TYPE), mask=mask)


@triton.jit
def load_number(address, code, k, absent, ACC: tl.constexpr):
    """Element ``k`` of the vector at an address, or ``absent`` where there is none (code -1)."""
    lane = k + tl.arange(0, 1)
    mask = only_if(code >= 0, lane >= 0)
    x = load_vector(address.to(tl.int64), code, lane, mask, ACC)
    return tl.sum(tl.where(mask, x, absent), axis=0)


@kernel
def mean_bias(
    weight, patches, bias, mean, gain: i64, gain_type, beta: i64, beta_type,
    group_size, length, group_stride: i64, row_stride: i64,
    inner, outer_stride: i64, inner_stride: i64, outer_patch, inner_patch,
    TYPE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The mean of one output channel and its bias ``beta - gain * mean``.

    The ``length`` elements of W that make it, ``(j // inner, j % inner)`` in the order of memory,
    each have a stride there and one in ``patches``. ``gain`` and ``beta`` are addresses.
    """
    o = tl.program_id(0)
    group = (o // group_size).to(tl.int64)
    own_weight = weight + group * group_stride + (o % group_size) * row_stride
    own_patches = patches + group * length
    total = tl.zeros([BLOCK], ACC)
    for start in range(0, length, BLOCK):
        j = start + tl.arange(0, BLOCK)
        a = j // inner
        b = j % inner
        mask = j < length
        at = a * outer_stride + b * inner_stride
        w = tl.load(own_weight + at, mask=mask, other=0.0).to(ACC)
        total += w * tl.load(own_patches + a * outer_patch + b * inner_patch, mask=mask, other=0.0)
    own_mean = tl.sum(total, axis=0)
    tl.store(mean + o, own_mean)
    own_gain = load_number(gain, gain_type, o, 1.0, ACC)
    own_beta = load_number(beta, beta_type, o, 0.0, ACC)
    tl.store(bias + o, (own_beta - own_gain * own_mean).to(TYPE))
