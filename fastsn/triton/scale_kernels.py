"""The Triton kernels that divide weights by sigma, and their gradient, for all layers of a call.

Sums are in a fixed order, so results depend on shapes, strides and types only.
"""

# mypy: disable-error-code="no-untyped-def, misc, valid-type"
import triton
import triton.language as tl

from fastsn.triton.common import (
    COUNT,
    F_ORDER,
    F_VECTOR,
    FIRST_OUTER,
    FIRST_PIECE,
    FIRST_SIGMA,
    LAYER,
    LAYER_FIELDS,
    LENGTH,
    NUMEL,
    OUTER_FIELDS,
    OUTER_INNER,
    OUTER_S,
    PIECES,
    S_ORDER,
    S_VECTOR,
    in_order,
    kernel,
    number,
    ordered_sum,
    weight_at,
)


@triton.jit
def factor_of(addresses, layer, snapshot, bound, zero_guard):
    """(factor, sigma, moves): W' = factor * W; whether the gradient sees sigma move."""
    scale = number(addresses, tl.load(layer + LAYER))
    count = tl.load(layer + COUNT)
    sigmas = snapshot + tl.load(layer + FIRST_SIGMA)
    sigma = tl.load(sigmas).to(tl.float64)
    for e in range(1, count):
        sigma += tl.load(sigmas + e).to(tl.float64)
    sigma = sigma / count.to(tl.float64)
    is_zero = (zero_guard != 0) & (sigma == 0.0)
    is_slack = (bound != 0) & (sigma <= scale)
    moves = (is_zero | is_slack) == 0
    factor = scale / tl.where(moves, sigma, 1.0)
    factor = tl.where(is_slack & (is_zero == 0), 1.0, factor)
    return factor, sigma, moves


@triton.jit
def range_of(layer, piece):
    """The elements of a piece of a layer."""
    begin = (piece - tl.load(layer + FIRST_PIECE)) * tl.load(layer + LENGTH)
    return begin, tl.minimum(begin + tl.load(layer + LENGTH), tl.load(layer + NUMEL))


@triton.jit
def load_flat(base, start, end, BLOCK: tl.constexpr):
    """base[start:start + BLOCK], 0 from ``end`` on; with loads of 16 bytes up to the last block."""
    pointer = tl.multiple_of(base + start, 16)
    lanes = tl.arange(0, BLOCK)
    if start + BLOCK <= end:
        x = tl.load(pointer + lanes)
    else:
        x = tl.load(pointer + lanes, mask=start + lanes < end, other=0.0)
    return x


@triton.jit
def store_flat(base, start, end, x, BLOCK: tl.constexpr):
    pointer = tl.multiple_of(base + start, 16)
    lanes = tl.arange(0, BLOCK)
    if start + BLOCK <= end:
        tl.store(pointer + lanes, x)
    else:
        tl.store(pointer + lanes, x, mask=start + lanes < end)


@kernel
def scale(
    addresses,
    others,
    layers,
    layer_of_piece,
    snapshot,
    first_piece,
    n_layers,
    bound,
    zero_guard,
    TYPE: tl.constexpr,
    RESULT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """W' = factor * W. The last piece first: the iteration has just been there."""
    piece = first_piece + tl.num_programs(0) - 1 - tl.program_id(0)
    layer = layers + tl.load(layer_of_piece + piece) * LAYER_FIELDS
    which = tl.load(layer + LAYER)
    weight = weight_at(addresses, n_layers + which, TYPE)
    result = weight_at(others, which, RESULT)
    factor, _, _ = factor_of(addresses, layer, snapshot, bound, zero_guard)
    begin, end = range_of(layer, piece)
    for start in range(begin, end, BLOCK):
        w = load_flat(weight, start, end, BLOCK).to(ACC)
        store_flat(result, start, end, (w * factor.to(ACC)).to(RESULT), BLOCK)


@kernel
def dot(
    addresses,
    others,
    layers,
    layer_of_piece,
    workspace,
    first_piece,
    n_layers,
    TYPE: tl.constexpr,
    GRAD: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """<G, W> of one piece."""
    piece = first_piece + tl.program_id(0)
    layer = layers + tl.load(layer_of_piece + piece) * LAYER_FIELDS
    which = tl.load(layer + LAYER)
    weight = weight_at(addresses, n_layers + which, TYPE)
    grad = weight_at(others, which, GRAD)
    begin, end = range_of(layer, piece)
    total = tl.zeros([BLOCK], ACC)
    for start in range(begin, end, BLOCK):
        w = load_flat(weight, start, end, BLOCK).to(ACC)
        total += load_flat(grad, start, end, BLOCK).to(ACC) * w
    tl.store(workspace + piece, tl.sum(total, axis=0))


@kernel
def gradient(
    addresses,
    others,
    layers,
    layer_of_piece,
    outers,
    orders,
    snapshot,
    workspace,
    first_piece,
    n_layers,
    bound,
    zero_guard,
    TYPE: tl.constexpr,
    GRAD: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dW = factor * (G - <G, W> / sigma * S), S the mean over estimates of u v^T."""
    piece = first_piece + tl.num_programs(0) - 1 - tl.program_id(0)
    layer = layers + tl.load(layer_of_piece + piece) * LAYER_FIELDS
    which = tl.load(layer + LAYER)
    grad = weight_at(others, which, GRAD)
    result = weight_at(others, n_layers + which, TYPE)
    factor, sigma, moves = factor_of(addresses, layer, snapshot, bound, zero_guard)
    parts = workspace + tl.load(layer + FIRST_PIECE)
    product = ordered_sum(parts, tl.load(layer + PIECES), ACC, 256).to(tl.float64)
    count = tl.load(layer + COUNT)
    divisor = tl.where(moves, sigma * count.to(tl.float64), 1.0)
    slope_factor = tl.where(moves, factor * (product / divisor), 0.0).to(ACC)
    first_outer = tl.load(layer + FIRST_OUTER)
    begin, end = range_of(layer, piece)
    lanes = tl.arange(0, BLOCK)
    for start in range(begin, end, BLOCK):
        mask = start + lanes < end
        slope = tl.zeros([BLOCK], ACC)
        for e in range(count):
            outer = outers + (first_outer + e) * OUTER_FIELDS
            n_s = tl.load(outer + OUTER_S)
            inner = tl.load(outer + OUTER_INNER)
            # Division of 64 bits is slow, so only the first element's.
            runs = start // inner
            i = (start - runs * inner).to(tl.int32) + lanes
            s = (runs % n_s).to(tl.int32) + i // inner.to(tl.int32)
            block = (runs // n_s).to(tl.int32) + s // n_s.to(tl.int32)
            s = s % n_s.to(tl.int32)
            f = block * inner.to(tl.int32) + i % inner.to(tl.int32)
            s = in_order(orders, tl.load(outer + S_ORDER), s, mask)
            f = in_order(orders, tl.load(outer + F_ORDER), f, mask)
            along_s = tl.load(snapshot + tl.load(outer + S_VECTOR) + s, mask=mask, other=0.0)
            along_f = tl.load(snapshot + tl.load(outer + F_VECTOR) + f, mask=mask, other=0.0)
            slope += along_s * along_f
        g = load_flat(grad, start, end, BLOCK).to(ACC) * factor.to(ACC)
        change = tl.where(moves, g - slope_factor * slope, g)
        store_flat(result, start, end, change.to(TYPE), BLOCK)
