// The kernels of kernels.h, compiled once per instruction set: the including file defines
// FASTSN_ISA (a namespace) and FASTSN_VECTOR_BYTES (what a register holds: the compiler keeps wider
// vectors in memory) and has set the compiler's target. Nothing here may instantiate a
// template or inline function of a library (std::vector, std::fill): the linker keeps one copy of
// those for the whole program, and it could be one that the machine cannot run.

namespace fastsn::FASTSN_ISA {
namespace {

// Rows handled together, so that each load of a vector over columns serves all of them.
constexpr int kRowBlock = 4;

template <typename Acc>
struct Simd {
  static constexpr int kLanes = FASTSN_VECTOR_BYTES / sizeof(Acc);
  typedef Acc Vec __attribute__((vector_size(FASTSN_VECTOR_BYTES)));
  // The same without the alignment that Vec promises.
  typedef Acc Unaligned
      __attribute__((vector_size(FASTSN_VECTOR_BYTES), aligned(sizeof(Acc)), may_alias));
};

template <typename Acc>
using Vec = typename Simd<Acc>::Vec;

template <typename Acc>
inline Vec<Acc> splat(Acc x) {
  return x - Vec<Acc>{};
}

template <typename Acc>
inline Vec<Acc> load(const Acc* p) {
  return *reinterpret_cast<const typename Simd<Acc>::Unaligned*>(p);
}

template <typename Acc>
inline void store_vec(Acc* p, Vec<Acc> x) {
  *reinterpret_cast<typename Simd<Acc>::Unaligned*>(p) = x;
}

typedef uint16_t Bits16
    __attribute__((vector_size(FASTSN_VECTOR_BYTES / 2), aligned(2), may_alias));
typedef uint32_t Bits32 __attribute__((vector_size(FASTSN_VECTOR_BYTES)));

template <typename Acc>
inline Vec<Acc> load(const c10::BFloat16* p) {
  const Bits16 raw = *reinterpret_cast<const Bits16*>(p);
  return reinterpret_cast<Vec<Acc>>(__builtin_convertvector(raw, Bits32) << 16);
}

inline void store_vec(c10::BFloat16* p, Vec<float> x) {
  const Bits32 bits = reinterpret_cast<Bits32>(x);
  const Bits32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const auto is_nan = x != x;
  const Bits32 result = is_nan ? (Bits32{} + 0x7fc0) : rounded;
  *reinterpret_cast<Bits16*>(p) = __builtin_convertvector(
      result, uint16_t __attribute__((vector_size(FASTSN_VECTOR_BYTES / 2))));
}

template <typename Acc>
inline Vec<Acc> load(const c10::Half* p) {
  Vec<Acc> x;
  for (int l = 0; l < Simd<Acc>::kLanes; ++l) {
    x[l] = static_cast<Acc>(p[l]);
  }
  return x;
}

inline void store_vec(c10::Half* p, Vec<float> x) {
  for (int l = 0; l < Simd<float>::kLanes; ++l) {
    p[l] = static_cast<c10::Half>(x[l]);
  }
}

// The sum of the lanes of a vector: its halves are added until 16 bytes are left.
template <typename Acc, typename Vector>
inline Acc sum_lanes(const Vector& x) {
  if constexpr (sizeof(Vector) > 16) {
    typedef Acc Half __attribute__((vector_size(sizeof(Vector) / 2)));
    Half low;
    Half high;
    __builtin_memcpy(&low, &x, sizeof(Half));
    __builtin_memcpy(&high, reinterpret_cast<const char*>(&x) + sizeof(Half), sizeof(Half));
    return sum_lanes<Acc>(low + high);
  } else {
    Acc sum = x[0] + x[1];
    if constexpr (sizeof(Acc) == 4) {
      sum += x[2] + x[3];
    }
    return sum;
  }
}

template <typename Acc>
inline void set_zero(Acc* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    x[i] = 0;
  }
}

// s[i] += sum_j w[i * stride + j] * x[j] for i < kRows, j < n.
template <int kRows, typename T, typename Acc>
inline void dot_rows(const T* w, int64_t stride, const Acc* x, int64_t n, Acc* s) {
  constexpr int kLanes = Simd<Acc>::kLanes;
  constexpr int kUnroll = 2;
  Vec<Acc> sum[kUnroll][kRows] = {};
  int64_t j = 0;
  for (; j + kUnroll * kLanes <= n; j += kUnroll * kLanes) {
    for (int k = 0; k < kUnroll; ++k) {
      const Vec<Acc> xj = load<Acc>(x + j + k * kLanes);
      for (int i = 0; i < kRows; ++i) {
        sum[k][i] += load<Acc>(w + i * stride + j + k * kLanes) * xj;
      }
    }
  }
  for (; j + kLanes <= n; j += kLanes) {
    const Vec<Acc> xj = load<Acc>(x + j);
    for (int i = 0; i < kRows; ++i) {
      sum[0][i] += load<Acc>(w + i * stride + j) * xj;
    }
  }
  for (int i = 0; i < kRows; ++i) {
    Acc tail = 0;
    for (int64_t k = j; k < n; ++k) {
      tail += static_cast<Acc>(w[i * stride + k]) * x[k];
    }
    s[i] += sum_lanes<Acc>(sum[0][i] + sum[1][i]) + tail;
  }
}

// t[j] += sum_i s[i] * w[i * stride + j] for i < kRows, j < n. Meanwhile, with kPrefetch, the rows
// after these come closer: this loop itself finds its rows in the cache and leaves memory idle.
template <int kRows, bool kPrefetch = false, typename T, typename Acc>
inline void add_rows(const T* w, int64_t stride, const Acc* s, int64_t n, Acc* t) {
  constexpr int kLanes = Simd<Acc>::kLanes;
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    Vec<Acc> tj = load<Acc>(t + j);
    for (int i = 0; i < kRows; ++i) {
      if constexpr (kPrefetch) {
        __builtin_prefetch(w + (kRows + i) * stride + j, 0, 2);
      }
      tj += load<Acc>(w + i * stride + j) * splat<Acc>(s[i]);
    }
    store_vec(t + j, tj);
  }
  for (; j < n; ++j) {
    for (int i = 0; i < kRows; ++i) {
      t[j] += static_cast<Acc>(w[i * stride + j]) * s[i];
    }
  }
}

template <int kCount>
struct Count {
  constexpr int operator()() const { return kCount; }
};

// Calls block(row, Count<rows>) over [begin, end), kRowBlock rows at a time.
template <typename Block>
inline void for_row_blocks(int64_t begin, int64_t end, const Block& block) {
  int64_t r = begin;
  for (; r + kRowBlock <= end; r += kRowBlock) {
    block(r, Count<kRowBlock>());
  }
  for (; r < end; ++r) {
    block(r, Count<1>());
  }
}

// A short vector x of `inner` elements, repeated to a whole number of SIMD vectors, so that
// position p of any run of rows finds x[p % inner] at p % length. Also the sums that fold back.
template <typename Acc>
struct Repeated {
  static constexpr int kLanes = Simd<Acc>::kLanes;
  alignas(64) Acc values[kShortInner * kLanes];
  int64_t inner;
  int64_t length;

  explicit Repeated(int64_t inner_) : inner(inner_) {
    const int64_t power_of_two = inner & -inner;
    length = inner / (power_of_two < kLanes ? power_of_two : kLanes) * kLanes;
  }

  // values[p] = factor * x[(start + p) % inner]
  void fill(const Acc* x, int64_t start, Acc factor) {
    for (int64_t p = 0; p < inner; ++p) {
      values[p] = factor * x[start + p < inner ? start + p : start + p - inner];
    }
    for (int64_t p = inner; p < length; ++p) {
      values[p] = values[p - inner];
    }
  }

  // sum[p] += w[p] * values[p % length]
  template <typename T>
  void add_product_to(Acc* sum, const T* w, int64_t n) const {
    int64_t p = 0;
    while (p + kLanes <= n) {
      for (int64_t q = 0; q < length && p + kLanes <= n; q += kLanes, p += kLanes) {
        store_vec(sum + p, load<Acc>(sum + p) + load<Acc>(w + p) * load<Acc>(values + q));
      }
    }
    for (; p < n; ++p) {
      sum[p] += static_cast<Acc>(w[p]) * values[p % length];
    }
  }

  // x[p % inner] += w[p] * y[p], through `values` as partial sums.
  template <typename T>
  void fold_product(const T* w, const Acc* y, int64_t n, Acc* x) {
    for (int64_t q = 0; q < length; ++q) {
      values[q] = 0;
    }
    int64_t p = 0;
    while (p + kLanes <= n) {
      for (int64_t q = 0; q < length && p + kLanes <= n; q += kLanes, p += kLanes) {
        store_vec(values + q, load<Acc>(values + q) + load<Acc>(w + p) * load<Acc>(y + p));
      }
    }
    for (; p < n; ++p) {
      values[p % length] += static_cast<Acc>(w[p]) * y[p];
    }
    for (int64_t q = 0; q < length; ++q) {
      x[q % inner] += values[q];
    }
  }
};

// expanded[r * inner + b] = x[r]
template <typename Acc>
inline void expand(const Acc* x, int64_t rows, int64_t inner, Acc* expanded) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t b = 0; b < inner; ++b) {
      expanded[r * inner + b] = x[r];
    }
  }
}

// x[r] += sum_b expanded[r * inner + b]
template <typename Acc>
inline void collapse(const Acc* expanded, int64_t rows, int64_t inner, Acc* x) {
  for (int64_t r = 0; r < rows; ++r) {
    Acc sum = 0;
    for (int64_t b = 0; b < inner; ++b) {
      sum += expanded[r * inner + b];
    }
    x[r] += sum;
  }
}

template <typename T, typename Acc>
void u_first_short(
    const T* w, Shape shape, int64_t begin, int64_t end, const Acc* v, Acc* s, Acc* t,
    Acc* expanded) {
  const int64_t n = (end - begin) * shape.inner;
  const int64_t pitch = shape.rows * shape.inner;
  w += begin * shape.inner;
  set_zero(expanded, n);
  Repeated<Acc> column(shape.inner);
  for (int64_t a = 0; a < shape.outer; ++a) {
    column.fill(v + a * shape.inner, 0, 1);
    column.add_product_to(expanded, w + a * pitch, n);
  }
  set_zero(s + begin, end - begin);
  collapse(expanded, end - begin, shape.inner, s + begin);
  if (t == nullptr) {
    return;
  }
  expand(s + begin, end - begin, shape.inner, expanded);
  for (int64_t a = 0; a < shape.outer; ++a) {
    column.fold_product(w + a * pitch, expanded, n, t + a * shape.inner);
  }
}

template <typename T, typename Acc>
void u_first_long(
    const T* w, Shape shape, int64_t begin, int64_t end, const Acc* v, Acc* s, Acc* t) {
  const int64_t inner = shape.inner;
  const int64_t pitch = shape.rows * inner;
  for_row_blocks(begin, end, [&](int64_t r, auto rows) {
    Acc* sr = s + r;
    set_zero(sr, rows());
    for (int64_t a = 0; a < shape.outer; ++a) {
      dot_rows<rows()>(w + a * pitch + r * inner, inner, v + a * inner, inner, sr);
    }
    for (int64_t a = 0; t != nullptr && a < shape.outer; ++a) {
      add_rows<rows(), true>(w + a * pitch + r * inner, inner, sr, inner, t + a * inner);
    }
  });
}

template <typename T, typename Acc>
void u_first(
    const void* weight, Shape shape, int64_t begin, int64_t end, const Acc* v, Acc* s, Acc* t,
    Acc* scratch) {
  const T* w = static_cast<const T*>(weight);
  if (shape.inner <= kShortInner) {
    u_first_short(w, shape, begin, end, v, s, t, scratch);
  } else {
    u_first_long(w, shape, begin, end, v, s, t);
  }
}

template <typename T, typename Acc>
void v_first_short(
    const T* w, Shape shape, int64_t begin, int64_t end, const Acc* u, Acc* t, Acc* s,
    Acc* scratch) {
  const int64_t n = shape.rows * shape.inner;
  Acc* expanded = scratch;
  Acc* sum = scratch + n;
  expand(u, shape.rows, shape.inner, expanded);
  set_zero(sum, n);
  Repeated<Acc> column(shape.inner);
  for (int64_t a = begin; a < end; ++a) {
    Acc* ta = t + a * shape.inner;
    set_zero(ta, shape.inner);
    column.fold_product(w + a * n, expanded, n, ta);
    column.fill(ta, 0, 1);
    column.add_product_to(sum, w + a * n, n);
  }
  collapse(sum, shape.rows, shape.inner, s);
}

template <typename T, typename Acc>
void v_first_long(
    const T* w, Shape shape, int64_t begin, int64_t end, const Acc* u, Acc* t, Acc* s) {
  const int64_t inner = shape.inner;
  const bool by_column = shape.outer == 1;
  const int64_t width = by_column ? end - begin : inner;
  const int64_t first = by_column ? 0 : begin;
  const int64_t last = by_column ? 1 : end;
  for (int64_t a = first; a < last; ++a) {
    const int64_t offset = by_column ? begin : 0;
    const T* wa = w + a * shape.rows * inner + offset;
    Acc* ta = t + a * inner + offset;
    set_zero(ta, width);
    for_row_blocks(0, shape.rows, [&](int64_t r, auto rows) {
      add_rows<rows()>(wa + r * inner, inner, u + r, width, ta);
    });
    for_row_blocks(0, shape.rows, [&](int64_t r, auto rows) {
      dot_rows<rows()>(wa + r * inner, inner, ta, width, s + r);
    });
  }
}

template <typename T, typename Acc>
void v_first(
    const void* weight, Shape shape, int64_t begin, int64_t end, const Acc* u, Acc* t, Acc* s,
    Acc* scratch) {
  const T* w = static_cast<const T*>(weight);
  if (shape.inner <= kShortInner) {
    v_first_short(w, shape, begin, end, u, t, s, scratch);
  } else {
    v_first_long(w, shape, begin, end, u, t, s);
  }
}

template <typename T, typename Out, typename Acc>
inline void scale_into(const T* w, Acc factor, Out* out, int64_t n) {
  constexpr int kLanes = Simd<Acc>::kLanes;
  const Vec<Acc> f = splat<Acc>(factor);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    store_vec(out + i, load<Acc>(w + i) * f);
  }
  for (; i < n; ++i) {
    out[i] = static_cast<Out>(static_cast<Acc>(w[i]) * factor);
  }
}

template <typename T, typename Acc>
void scale(const void* weight, Acc factor, void* out, int64_t begin, int64_t end) {
  scale_into(
      static_cast<const T*>(weight) + begin, factor, static_cast<T*>(out) + begin, end - begin);
}

template <typename T, typename Acc>
void load_scaled(const void* grad, Acc factor, Acc* buffer, int64_t begin, int64_t end) {
  scale_into(static_cast<const T*>(grad) + begin, factor, buffer, end - begin);
}

template <typename T, typename Acc>
void store(const Acc* buffer, void* out, int64_t begin, int64_t end) {
  scale_into(buffer, Acc(1), static_cast<T*>(out) + begin, end - begin);
}

template <typename T, typename Acc>
Acc dot(const void* grad, const void* weight, int64_t begin, int64_t end) {
  const T* g = static_cast<const T*>(grad) + begin;
  const T* w = static_cast<const T*>(weight) + begin;
  const int64_t n = end - begin;
  constexpr int kLanes = Simd<Acc>::kLanes;
  constexpr int kUnroll = 4;
  Vec<Acc> sum[kUnroll] = {};
  int64_t i = 0;
  for (; i + kUnroll * kLanes <= n; i += kUnroll * kLanes) {
    for (int k = 0; k < kUnroll; ++k) {
      sum[k] += load<Acc>(g + i + k * kLanes) * load<Acc>(w + i + k * kLanes);
    }
  }
  Acc tail = 0;
  for (; i < n; ++i) {
    tail += static_cast<Acc>(g[i]) * static_cast<Acc>(w[i]);
  }
  return sum_lanes<Acc>((sum[0] + sum[1]) + (sum[2] + sum[3])) + tail;
}

template <typename Acc>
void add_outer(
    Acc* buffer, Shape shape, int64_t begin, int64_t end, Acc coefficient, const Acc* u,
    const Acc* v) {
  const int64_t pitch = shape.rows * shape.inner;
  if (shape.inner <= kShortInner) {
    Repeated<Acc> column(shape.inner);
    for (int64_t i = begin; i < end;) {
      const int64_t a = i / pitch;
      const int64_t p = i - a * pitch;
      const int64_t n = (end - i < pitch - p) ? end - i : pitch - p;
      column.fill(v + a * shape.inner, p % shape.inner, coefficient);
      column.add_product_to(buffer + (i - begin), u + p, n);
      i += n;
    }
    return;
  }
  for (int64_t i = begin; i < end;) {
    const int64_t line = i / shape.inner;
    const int64_t b = i - line * shape.inner;
    const int64_t n = (end - i < shape.inner - b) ? end - i : shape.inner - b;
    const Acc factor = coefficient * u[line % shape.rows];
    add_rows<1>(v + line / shape.rows * shape.inner + b, 0, &factor, n, buffer + (i - begin));
    i += n;
  }
}

template <typename Acc>
void add(const Acc* x, Acc* y, int64_t n) {
  const Acc one = 1;
  add_rows<1>(x, 0, &one, n, y);
}

template <typename Acc>
inline void divide(Acc* x, int64_t n, Acc by) {
  constexpr int kLanes = Simd<Acc>::kLanes;
  const Vec<Acc> divisor = splat<Acc>(by);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    store_vec(x + i, load<Acc>(x + i) / divisor);
  }
  for (; i < n; ++i) {
    x[i] /= by;
  }
}

// The largest |x[i]| that is a number, or `least` if that is larger.
template <typename Acc>
inline Acc largest(const Acc* x, int64_t n, Acc least) {
  constexpr int kLanes = Simd<Acc>::kLanes;
  Vec<Acc> found = splat<Acc>(least);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec<Acc> xi = load<Acc>(x + i);
    const Vec<Acc> size = xi < 0 ? -xi : xi;
    found = size > found ? size : found;
  }
  Acc result = least;
  for (; i < n; ++i) {
    const Acc size = x[i] < 0 ? -x[i] : x[i];
    result = size > result ? size : result;
  }
  for (int l = 0; l < kLanes; ++l) {
    result = found[l] > result ? found[l] : result;
  }
  return result;
}

// Divided by its largest element first: then squares neither overflow nor vanish.
template <typename Acc>
void make_unit(Acc* x, int64_t n) {
  constexpr Acc kSmallest = sizeof(Acc) == 4 ? __FLT_MIN__ : __DBL_MIN__;
  divide(x, n, largest(x, n, kSmallest));
  const Acc norm = static_cast<Acc>(__builtin_sqrt(dot<Acc, Acc>(x, x, 0, n)));
  divide(x, n, norm < kSmallest ? kSmallest : norm);
}

// The sum of kRows vectors or numbers, load(0), load(1), and so on, in pairs: its rounding errors
// stay small, and its additions need not wait for each other.
template <int kRows, typename Load>
inline auto sum_in_pairs(const Load& load) {
  if constexpr (kRows == 1) {
    return load(0);
  } else {
    constexpr int kHalf = kRows / 2;
    return sum_in_pairs<kHalf>(load) + sum_in_pairs<kHalf>([&](int i) { return load(kHalf + i); });
  }
}

template <int kRows, typename T, typename Acc>
inline void sum_row_block(const T* x, int64_t stride, Acc* out, int64_t length) {
  constexpr int kLanes = Simd<Acc>::kLanes;
  int64_t j = 0;
  for (; j + kLanes <= length; j += kLanes) {
    const auto sum = sum_in_pairs<kRows>(
        [&](int i) { return fastsn::FASTSN_ISA::load<Acc>(x + i * stride + j); });
    store_vec(out + j, load<Acc>(out + j) + sum);
  }
  for (; j < length; ++j) {
    out[j] += sum_in_pairs<kRows>([&](int i) { return static_cast<Acc>(x[i * stride + j]); });
  }
}

template <typename T, typename Acc>
void sum_rows(const void* rows, int64_t stride, int64_t n, Acc* out, int64_t length) {
  constexpr int kLanes = Simd<Acc>::kLanes;
  const T* x = static_cast<const T*>(rows);
  if (length < kLanes && stride == length && n >= 2 * kLanes) {  // rows without gaps fill vectors
    alignas(64) Acc joined[kLanes * kLanes] = {};
    const int64_t blocks = n / kLanes;
    sum_rows<T>(x, kLanes * length, blocks, joined, kLanes * length);
    sum_row_block<kLanes>(joined, length, out, length);
    x += blocks * kLanes * length;
    n -= blocks * kLanes;
  }
  constexpr int kBlock = 8;
  for (; n >= kBlock; n -= kBlock, x += kBlock * stride) {
    sum_row_block<kBlock>(x, stride, out, length);
  }
  if (n >= 4) {
    sum_row_block<4>(x, stride, out, length);
    n -= 4;
    x += 4 * stride;
  }
  for (; n > 0; --n, x += stride) {
    sum_row_block<1>(x, stride, out, length);
  }
}

template <typename T, typename Acc>
constexpr Kernels<Acc> kTable = {u_first<T, Acc>,     v_first<T, Acc>, scale<T, Acc>, dot<T, Acc>,
                                 load_scaled<T, Acc>, add_outer<Acc>,  store<T, Acc>, add<Acc>,
                                 make_unit<Acc>,      sum_rows<T, Acc>};

}  // namespace

const Kernels<float>& float_kernels(c10::ScalarType weight_type) {
  switch (weight_type) {
    case c10::ScalarType::BFloat16:
      return kTable<c10::BFloat16, float>;
    case c10::ScalarType::Half:
      return kTable<c10::Half, float>;
    default:
      return kTable<float, float>;
  }
}

const Kernels<double>& double_kernels() { return kTable<double, double>; }

}  // namespace fastsn::FASTSN_ISA
