"""The Triton kernels of power iteration, for all estimates of a call.

The matrix of an estimate is described in the order of its memory: element (s, f) lies at
``s * inner + (f // inner) * (S * inner) + f % inner``. Where its rows are contiguous ``inner`` is F
and that is ``s * F + f``. One of s and f counts the rows of the matrix, so the vector along it is
u, and v is the other.

One power iteration reads W once, except where x is too long. y, of length P, runs along one of s
and f, x and z, of length Q, along the other::

    products    y = W x                   a tile owns a range of y, and adds up, for the last sum,
                z_t = W_t^T y_t           its part of z while its block of W is in registers
    combine     a = max(|y|, eps), t = (sum of z_t over tiles) / a
    finish      b = max(|t|, eps), sigma = |t|^2 / b, new vectors y / a and t / b

Sums are in a fixed order, so results depend on shapes, strides and types only.
"""

# mypy: disable-error-code="no-untyped-def, misc, valid-type"
import triton
import triton.language as tl

from fastsn.triton.common import (
    ESTIMATE,
    FIRST_CHUNK,
    FIRST_TILE,
    INNER,
    JOB_FIELDS,
    SIGMA,
    STEP,
    TILES,
    WEIGHT,
    WIDTH,
    WORK_CHUNK_SUMS,
    WORK_LENGTHS,
    WORK_NORM,
    WORK_PARTS,
    WORK_T,
    WORK_TILE_SUMS,
    WORK_X,
    WORK_Y,
    X_LIVE,
    X_ORDER,
    X_TYPE,
    Y_LIVE,
    Y_ORDER,
    Y_TYPE,
    P,
    Q,
    X,
    Y,
    at_least,
    in_order,
    kernel,
    load_vector,
    number,
    only_if,
    ordered_sum,
    store_vector,
    weight_at,
)


@triton.jit
def chunks_of(n_y, n_x, CHUNK: tl.constexpr):
    return tl.maximum((tl.maximum(n_y, n_x) + CHUNK - 1) // CHUNK, 1)


@triton.jit
def measure_part(x, largest_at, squares_at):
    """The largest element of a part of a vector, and the sum of squares divided by it.

    In fp64 the smallest normal number is a divisor that leaves zeros as they are.
    """
    x = x.to(tl.float64)
    largest = tl.maximum(tl.max(tl.abs(x), axis=0), 2.2250738585072014e-308)
    tl.store(largest_at, largest)
    ratio = x / largest
    tl.store(squares_at, tl.sum(ratio * ratio, axis=0))


@kernel
def measure(
    addresses,
    jobs,
    job_of_chunk,
    workspace,
    first_chunk,
    ACC: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """What of one chunk of u and v at rest is needed for their lengths, of y first and then of x.

    Squares alone could overflow or vanish.
    """
    chunk = first_chunk + tl.program_id(0)
    job = jobs + tl.load(job_of_chunk + chunk) * JOB_FIELDS
    own = chunk - tl.load(job + FIRST_CHUNK)
    n_y = tl.load(job + P)
    n_x = tl.load(job + Q)
    k = own * CHUNK + tl.arange(0, CHUNK)
    count = chunks_of(n_y, n_x, CHUNK)
    parts = workspace + tl.load(job + WORK_LENGTHS) + own
    address = tl.load(addresses + tl.load(job + Y_LIVE))
    y = load_vector(address, tl.load(job + Y_TYPE), k, k < n_y, ACC)
    measure_part(y, parts, parts + count)
    address = tl.load(addresses + tl.load(job + X_LIVE))
    x = load_vector(address, tl.load(job + X_TYPE), k, k < n_x, ACC)
    measure_part(x, parts + 2 * count, parts + 3 * count)


@triton.jit
def unit(x, parts, count, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """x / |x|, where :func:`measure` has left what is known of each of the chunks of x."""
    lanes = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], 2.2250738585072014e-308, tl.float64)
    for k in range(0, count, BLOCK):
        part = tl.load(parts + k + lanes, mask=k + lanes < count, other=0.0)
        largest = tl.maximum(largest, part.to(tl.float64))
    top = tl.max(largest, axis=0)
    squares = tl.zeros([BLOCK], tl.float64)
    for k in range(0, count, BLOCK):
        mask = k + lanes < count
        ratio = tl.load(parts + k + lanes, mask=mask, other=0.0).to(tl.float64) / top
        part = tl.load(parts + count + k + lanes, mask=mask, other=0.0).to(tl.float64)
        squares += part * ratio * ratio
    length = at_least(tl.sqrt(tl.sum(squares, axis=0)), 2.2250738585072014e-308)
    return (x.to(tl.float64) / top / length).to(ACC)


@kernel
def read_vectors(
    addresses,
    jobs,
    job_of_chunk,
    orders,
    snapshot,
    workspace,
    ACC: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Copies u and v, of any type, into the snapshot, and x into the workspace.

    At rest what is copied is of length 1.
    """
    chunk = tl.program_id(0)
    job = jobs + tl.load(job_of_chunk + chunk) * JOB_FIELDS
    k = (chunk - tl.load(job + FIRST_CHUNK)) * CHUNK + tl.arange(0, CHUNK)
    is_estimate = tl.load(job + ESTIMATE) != 0
    count = chunks_of(tl.load(job + P), tl.load(job + Q), CHUNK)
    lengths = workspace + tl.load(job + WORK_LENGTHS)
    mask = k < tl.load(job + P)
    address = tl.load(addresses + tl.load(job + Y_LIVE))
    y = load_vector(address, tl.load(job + Y_TYPE), k, mask, ACC)
    if is_estimate:
        y = unit(y, lengths, count, ACC, CHUNK)
    tl.store(snapshot + tl.load(job + Y) + k, y, mask=mask)
    mask = k < tl.load(job + Q)
    address = tl.load(addresses + tl.load(job + X_LIVE))
    index = in_order(orders, tl.load(job + X_ORDER), k, mask)
    x = load_vector(address, tl.load(job + X_TYPE), index, mask, ACC)
    if is_estimate:
        x = unit(x, lengths + 2 * count, count, ACC, CHUNK)
    tl.store(snapshot + tl.load(job + X) + index, x, mask=mask)
    tl.store(workspace + tl.load(job + WORK_X) + k, x, mask=mask)


@triton.jit
def load_block(weight, y, x, y_mask, x_mask, n_s, inner, ACC: tl.constexpr, S_FIRST: tl.constexpr):
    """The elements of W at these places along y and x, one row per y."""
    outer_stride = n_s.to(tl.int64) * inner
    if S_FIRST:
        along_y = y.to(tl.int64) * inner
        along_x = (x // inner).to(tl.int64) * outer_stride + x % inner
    else:
        along_y = (y // inner).to(tl.int64) * outer_stride + y % inner
        along_x = x.to(tl.int64) * inner
    mask = y_mask[:, None] & x_mask[None, :]
    return tl.load(weight + (along_y[:, None] + along_x[None, :]), mask=mask, other=0.0).to(ACC)


@triton.jit
def hold(
    weight, job, own, n_y, n_x, step, inner, orders, snapshot, workspace,
    ACC: tl.constexpr, S_FIRST: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """:func:`products` of a tile where a block reaches along all of x: W is read once."""
    is_estimate = tl.load(job + ESTIMATE) != 0
    x = tl.arange(0, BLOCK_X)
    x_mask = x < n_x
    # Begins at a multiple of 16 bytes.
    vector_at = tl.multiple_of(workspace + tl.load(job + WORK_X), 16)
    square = tl.zeros([BLOCK_Y], ACC)
    # Rows are added up at the end, columns at once: their sum needs few registers and exchanges.
    z = tl.zeros([BLOCK_Y, BLOCK_X] if S_FIRST else [BLOCK_X], ACC)
    begin = own * step
    for start in range(begin, tl.minimum(begin + step, n_y), BLOCK_Y):
        y = start + tl.arange(0, BLOCK_Y)
        y_mask = y < tl.minimum(begin + step, n_y)
        w = load_block(weight, y, x, y_mask, x_mask, n_y if S_FIRST else n_x, inner, ACC, S_FIRST)
        # Loaded for every block, from a cache, as registers are few.
        vector = tl.load(vector_at + x, mask=x_mask, other=0.0)
        result = tl.where(y_mask, tl.sum(w * vector[None, :], axis=1), 0.0)
        tl.store(workspace + tl.load(job + WORK_Y) + y, result, mask=y_mask)
        square += result * other_factor(job, y, y_mask, result, orders, snapshot, S_FIRST)
        part = w * result[:, None]
        z += part if S_FIRST else tl.sum(part, axis=0)
    tl.store(workspace + tl.load(job + WORK_TILE_SUMS) + own, tl.sum(square, axis=0))
    parts = workspace + tl.load(job + WORK_PARTS) + own.to(tl.int64) * n_x
    if S_FIRST:
        z = tl.sum(z, axis=0)
    tl.store(parts + x, z, mask=only_if(is_estimate == 0, x_mask))


@triton.jit
def read_twice(
    weight, job, own, n_y, n_x, step, inner, orders, snapshot, workspace,
    ACC: tl.constexpr, S_FIRST: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """:func:`products` of a tile, which is as wide as a block, of any length along x."""
    is_estimate = tl.load(job + ESTIMATE) != 0
    vector_at = tl.multiple_of(workspace + tl.load(job + WORK_X), 16)
    n_s = n_y if S_FIRST else n_x
    y = own * step + tl.arange(0, BLOCK_Y)
    y_mask = y < tl.minimum(own * step + step, n_y)
    total = tl.zeros([BLOCK_Y, BLOCK_X], ACC)
    for start in range(0, n_x, BLOCK_X):
        x = start + tl.arange(0, BLOCK_X)
        x_mask = x < n_x
        w = load_block(weight, y, x, y_mask, x_mask, n_s, inner, ACC, S_FIRST)
        vector = tl.load(vector_at + x, mask=x_mask, other=0.0)
        total += w * vector[None, :]
    result = tl.where(y_mask, tl.sum(total, axis=1), 0.0)
    tl.store(workspace + tl.load(job + WORK_Y) + y, result, mask=y_mask)
    square = result * other_factor(job, y, y_mask, result, orders, snapshot, S_FIRST)
    tl.store(workspace + tl.load(job + WORK_TILE_SUMS) + own, tl.sum(square, axis=0))
    part = workspace + tl.load(job + WORK_PARTS) + own.to(tl.int64) * n_x
    for start in range(0, tl.where(is_estimate, 0, n_x), BLOCK_X):
        x = start + tl.arange(0, BLOCK_X)
        x_mask = x < n_x
        w = load_block(weight, y, x, y_mask, x_mask, n_s, inner, ACC, S_FIRST)
        tl.store(part + x, tl.sum(w * result[:, None], axis=0), mask=x_mask)


@triton.jit
def other_factor(job, y, y_mask, result, orders, snapshot, S_FIRST: tl.constexpr):
    """What y = W x is multiplied with for the sum of the tile: u of an estimate, else itself."""
    factor = result
    # y of an estimate is along s.
    if S_FIRST:
        is_estimate = tl.load(job + ESTIMATE) != 0
        mask = only_if(is_estimate, y_mask)
        index = in_order(orders, tl.load(job + Y_ORDER), y, mask)
        u = tl.load(snapshot + tl.load(job + Y) + index, mask=mask, other=0.0)
        factor = tl.where(is_estimate, u, result)
    return factor


@kernel
def products(
    addresses,
    jobs,
    job_of_tile,
    orders,
    snapshot,
    workspace,
    first_tile,
    TYPE: tl.constexpr,
    ACC: tl.constexpr,
    S_FIRST: tl.constexpr,
    VECTOR: tl.constexpr,
    SIZE: tl.constexpr,
    WIDEST: tl.constexpr,
    RATIO: tl.constexpr,
    WIDTHS: tl.constexpr,
    HOLDS_ALL: tl.constexpr,
):
    """y = W x for one tile of y, its part of z = W^T y, and of |y|^2 (or of <u, W v>).

    ``S_FIRST``: y runs along s, x and z along f; otherwise the other way around. ``VECTOR``
    elements lie side by side at a multiple of 16 bytes. A block has ``SIZE`` elements, of which
    along x ``WIDEST``, or that divided by ``RATIO`` up to ``WIDTHS - 1`` times. No matrix is longer
    along x than that if the kernel ``HOLDS_ALL``.
    """
    tile = first_tile + tl.program_id(0)
    job = jobs + tl.load(job_of_tile + tile) * JOB_FIELDS
    weight = weight_at(addresses, tl.load(job + WEIGHT), TYPE)
    own = (tile - tl.load(job + FIRST_TILE)).to(tl.int32)
    n_y = tl.load(job + P).to(tl.int32)
    n_x = tl.load(job + Q).to(tl.int32)
    step = tl.load(job + STEP).to(tl.int32)
    width = tl.load(job + WIDTH)
    # From these hints Triton works out that it can load 16 bytes at a time.
    inner = tl.multiple_of(tl.load(job + INNER).to(tl.int32), VECTOR)
    if S_FIRST:
        n_x = tl.multiple_of(n_x, VECTOR)
    else:
        n_y = tl.multiple_of(n_y, VECTOR)
        step = tl.multiple_of(step, VECTOR)
    for k in tl.static_range(WIDTHS):
        if width == WIDEST // RATIO**k:
            hold(
                weight, job, own, n_y, n_x, step, inner, orders, snapshot, workspace,
                ACC, S_FIRST, SIZE * RATIO**k // WIDEST, WIDEST // RATIO**k,
            )  # fmt: skip
    if not HOLDS_ALL:
        if width == 0:
            read_twice(
                weight, job, own, n_y, n_x, step, inner, orders, snapshot, workspace,
                ACC, S_FIRST, SIZE * RATIO // WIDEST, WIDEST // RATIO,
            )  # fmt: skip


@kernel
def combine(
    addresses,
    jobs,
    job_of_chunk,
    snapshot,
    workspace,
    ACC: tl.constexpr,
    CHUNK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One chunk of t = z / a and its part of |t|^2; of an estimate, sigma is all there is to do."""
    chunk = tl.program_id(0)
    job = jobs + tl.load(job_of_chunk + chunk) * JOB_FIELDS
    own = chunk - tl.load(job + FIRST_CHUNK)
    n_x = tl.load(job + Q)
    n_tiles = tl.load(job + TILES)
    square = ordered_sum(workspace + tl.load(job + WORK_TILE_SUMS), n_tiles, ACC, CHUNK)
    if tl.load(job + ESTIMATE) != 0:
        tl.store(snapshot + tl.load(job + SIGMA), square, mask=own == 0)
    else:
        a = at_least(tl.sqrt(square.to(tl.float64)), number(addresses, 0))
        scale_y = (1.0 / a).to(ACC)
        tl.store(workspace + tl.load(job + WORK_NORM), scale_y, mask=own == 0)
        q = own * CHUNK + tl.arange(0, CHUNK)
        parts = workspace + tl.load(job + WORK_PARTS)
        total = tl.zeros([DEPTH, CHUNK], ACC)
        for start in range(0, n_tiles, DEPTH):
            tile = start + tl.arange(0, DEPTH)
            mask = (tile < n_tiles)[:, None] & (q < n_x)[None, :]
            total += tl.load(parts + (tile * n_x)[:, None] + q[None, :], mask=mask, other=0.0)
        t = tl.where(q < n_x, tl.sum(total, axis=0) * scale_y, 0.0)
        tl.store(workspace + tl.load(job + WORK_T) + q, t, mask=q < n_x)
        tl.store(workspace + tl.load(job + WORK_CHUNK_SUMS) + own, tl.sum(t * t, axis=0))


@kernel
def finish(
    addresses,
    jobs,
    job_of_chunk,
    orders,
    snapshot,
    workspace,
    zero_guard,
    ACC: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """sigma, and one chunk of the new u and v, into the snapshot and into the live u and v."""
    chunk = tl.program_id(0)
    job = jobs + tl.load(job_of_chunk + chunk) * JOB_FIELDS
    own = chunk - tl.load(job + FIRST_CHUNK)
    n_y = tl.load(job + P)
    n_x = tl.load(job + Q)
    # One sum for each chunk of t.
    sums = workspace + tl.load(job + WORK_CHUNK_SUMS)
    norm = tl.sqrt(ordered_sum(sums, (n_x + CHUNK - 1) // CHUNK, ACC, CHUNK).to(tl.float64))
    b = at_least(norm, number(addresses, 0))
    sigma = (norm * (norm / b)).to(ACC)
    tl.store(snapshot + tl.load(job + SIGMA), sigma, mask=own == 0)

    moves = (zero_guard == 0) | (sigma != 0)
    k = own * CHUNK + tl.arange(0, CHUNK)
    mask = only_if(moves, k < n_y)
    y = tl.load(workspace + tl.load(job + WORK_Y) + k, mask=mask, other=0.0)
    y = y * tl.load(workspace + tl.load(job + WORK_NORM))
    index = in_order(orders, tl.load(job + Y_ORDER), k, mask)
    tl.store(snapshot + tl.load(job + Y) + index, y, mask=mask)
    store_vector(addresses, tl.load(job + Y_LIVE), tl.load(job + Y_TYPE), index, y, mask)

    mask = only_if(moves, k < n_x)
    x = tl.load(workspace + tl.load(job + WORK_T) + k, mask=mask, other=0.0) * (1.0 / b).to(ACC)
    tl.store(workspace + tl.load(job + WORK_X) + k, x, mask=mask)
    index = in_order(orders, tl.load(job + X_ORDER), k, mask)
    tl.store(snapshot + tl.load(job + X) + index, x, mask=mask)
    store_vector(addresses, tl.load(job + X_LIVE), tl.load(job + X_TYPE), index, x, mask)
