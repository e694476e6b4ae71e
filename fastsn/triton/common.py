"""What all Triton kernels share: tables, types, addresses. This file imports nothing but Triton.

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
