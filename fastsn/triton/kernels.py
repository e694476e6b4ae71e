"""The Triton kernels. This file imports nothing but Triton.

Every kernel works on all layers of a call. The matrix of an estimate is described in the order of
its memory: element (s, f) lies at ``s * inner + (f // inner) * (S * inner) + f % inner``. Where its
rows are contiguous ``inner`` is F and that is ``s * F + f``. One of s and f counts the rows of the
matrix, so the vector along it is u, and v is the other.

One power iteration reads W once, except where x is too long. y, of length P, runs along one of s
and f, x and z, of length Q, along the other::

    products    y = W x                   a tile owns a range of y, and adds up, for the last sum,
                z_t = W_t^T y_t           its part of z while its block of W is in registers
    combine     a = max(|y|, eps), t = (sum of z_t over tiles) / a
    finish      b = max(|t|, eps), sigma = |t|^2 / b, new vectors y / a and t / b

Sums are in a fixed order, so results depend on shapes, strides and types only.

All tables are int64: rows of fields for jobs (one power iteration of an estimate), layers and outer
products, the row that each program works on, and the addresses of tensors.
"""

# mypy: disable-error-code="no-untyped-def, misc, valid-type"
import triton
import triton.language as tl

# Fields of a job.
(
    WEIGHT,  # which of the addresses
    P,
    Q,
    INNER,
    STEP,  # elements of y per tile
    WIDTH,  # of a block along x, or 0 where x is longer than any block
    FIRST_TILE,
    TILES,
    FIRST_CHUNK,
    Y,  # where in the snapshot
    X,
    SIGMA,
    Y_ORDER,  # where in `orders` y has its order of elements, or -1
    X_ORDER,
    Y_LIVE,  # which of the addresses
    X_LIVE,
    Y_TYPE,  # see VECTOR_TYPES
    X_TYPE,
    ESTIMATE,  # 1: no iteration, sigma = <y, W x> of unit vectors y and x
    WORK_X,  # where in the workspace; x in memory order
    WORK_Y,
    WORK_PARTS,
    WORK_T,
    WORK_TILE_SUMS,
    WORK_CHUNK_SUMS,
    WORK_NORM,
    WORK_LENGTHS,
    JOB_FIELDS,
) = map(tl.constexpr, range(28))

# Fields of a layer.
LAYER, NUMEL, LENGTH, FIRST_PIECE, PIECES, FIRST_SIGMA, COUNT, FIRST_OUTER, LAYER_FIELDS = map(
    tl.constexpr, range(9)
)

# Fields of an outer product: its size along s, and for each of s and f where in the snapshot its
# vector lies and in which order.
OUTER_S, OUTER_INNER, S_VECTOR, F_VECTOR, S_ORDER, F_ORDER, OUTER_FIELDS = map(
    tl.constexpr, range(7)
)

# The types of u and v that kernels read and write where they are.
VECTOR_TYPES = ("float32", "float64", "bfloat16", "float16")

PACKED = 64  # addresses that one launch of `pack` takes


def kernel(function):
    """A kernel compiled once per types and constants, not once more per values and alignments."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(do_not_specialize=[name for name in names if not name.isupper()])(function)


i64 = tl.int64


@kernel
def pack(table, first, p0: i64, p1: i64, p2: i64, p3: i64, p4: i64, p5: i64, p6: i64, p7: i64,
         p8: i64, p9: i64, p10: i64, p11: i64, p12: i64, p13: i64, p14: i64, p15: i64, p16: i64,
         p17: i64, p18: i64, p19: i64, p20: i64, p21: i64, p22: i64, p23: i64, p24: i64,
         p25: i64, p26: i64, p27: i64, p28: i64, p29: i64, p30: i64, p31: i64, p32: i64,
         p33: i64, p34: i64, p35: i64, p36: i64, p37: i64, p38: i64, p39: i64, p40: i64,
         p41: i64, p42: i64, p43: i64, p44: i64, p45: i64, p46: i64, p47: i64, p48: i64,
         p49: i64, p50: i64, p51: i64, p52: i64, p53: i64, p54: i64, p55: i64, p56: i64,
         p57: i64, p58: i64, p59: i64, p60: i64, p61: i64, p62: i64, p63: i64):  # fmt: skip
    """``table[first:first + 64] = values``, which travel as arguments: a graph can capture that."""
    values = (p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, p10, p11, p12, p13, p14, p15, p16, p17,
              p18, p19, p20, p21, p22, p23, p24, p25, p26, p27, p28, p29, p30, p31, p32, p33,
              p34, p35, p36, p37, p38, p39, p40, p41, p42, p43, p44, p45, p46, p47, p48, p49,
              p50, p51, p52, p53, p54, p55, p56, p57, p58, p59, p60, p61, p62, p63)  # fmt: skip
    for i in tl.static_range(64):
        tl.store(table + first + i, values[i])


@triton.jit
def pointer_to(addresses, which, TYPE: tl.constexpr):
    return tl.load(addresses + which).to(tl.pointer_type(TYPE), bitcast=True)


@triton.jit
def weight_at(addresses, which, TYPE: tl.constexpr):
    """A pointer to a weight or its like, which begin at multiples of 16 bytes."""
    # A hint sticks to an operation, not to the result of a function.
    return tl.multiple_of(tl.load(addresses + which).to(tl.pointer_type(TYPE), bitcast=True), 16)


@triton.jit
def number(addresses, which):
    """The fp64 number that is packed among the addresses."""
    return tl.load(addresses + which).to(tl.float64, bitcast=True)


@triton.jit
def only_if(condition, mask):
    """``mask & condition``, of which the interpreter makes no mask if the condition is a scalar."""
    return tl.where(condition, mask, False)


@triton.jit
def in_order(orders, order, k, mask):
    """Where element ``k`` (in memory order) of a vector lies in the vector."""
    has_order = order >= 0
    moved = tl.load(orders + order + k, mask=only_if(has_order, mask), other=0)
    return tl.where(has_order, moved, k)


@triton.jit
def ordered_sum(values, count, ACC: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], ACC)
    for k in range(0, count, BLOCK):
        total += tl.load(values + k + lanes, mask=k + lanes < count, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def at_least(norm, eps):
    """max(norm, eps), NaN where norm is NaN."""
    return tl.where(norm < eps, eps, norm)


@triton.jit
def load_typed(address, k, mask, TYPE: tl.constexpr):
    return tl.load(address.to(tl.pointer_type(TYPE), bitcast=True) + k, mask=mask, other=0.0)


@triton.jit
def load_vector(address, code, k, mask, ACC: tl.constexpr):
    """Elements ``k`` of the vector at an address, of the type ``VECTOR_TYPES[code]``."""
    if code == 0:
        x = load_typed(address, k, mask, tl.float32).to(ACC)
    elif code == 1:
        x = load_typed(address, k, mask, tl.float64).to(ACC)
    elif code == 2:
        x = load_typed(address, k, mask, tl.bfloat16).to(ACC)
    else:
        x = load_typed(address, k, mask, tl.float16).to(ACC)
    return x


@triton.jit
def store_vector(addresses, which, code, k, x, mask):
    if code == 0:
        tl.store(pointer_to(addresses, which, tl.float32) + k, x.to(tl.float32), mask=mask)
    elif code == 1:
        tl.store(pointer_to(addresses, which, tl.float64) + k, x.to(tl.float64), mask=mask)
    elif code == 2:
        # As torch does it; the interpreter makes no bfloat16 out of fp64.
        narrow = x.to(tl.float32).to(tl.bfloat16)
        tl.store(pointer_to(addresses, which, tl.bfloat16) + k, narrow, mask=mask)
    else:
        tl.store(pointer_to(addresses, which, tl.float16) + k, x.to(tl.float16), mask=mask)


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
