// The inner loops for one instruction set; block_sparse.cpp includes this file once for each.
//
// The including file defines ISA (a namespace), ISA_TARGET (a function attribute), VECTOR_BYTES,
// TILE_ROWS (the most rows of x in one tile), ISA_F16 (has half-precision conversions) and
// ISA_DOT (has bfloat16 dot products). Every function here carries ISA_TARGET, also those that are
// inlined: a compiler lowers wide vectors before it inlines.
//
// A tile is TILE_ROWS x 4 dot products along in_features. Each is one vector of partial sums that
// stays in a register over all blocks of a block row and is summed over its lanes once, at the end,
// always in the same order: a result depends neither on M, nor on its place in a tile, nor on the
// number of threads.

namespace ISA {

constexpr int kLanes = VECTOR_BYTES / 4;
typedef float Floats __attribute__((vector_size(VECTOR_BYTES)));
typedef float LooseFloats __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef uint16_t LooseHalves __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));

#define INLINE ISA_TARGET static inline __attribute__((always_inline))

// Element types. kStep: numbers that one multiply-add takes along in_features. Prepared: how x is
// held. load, store: kLanes numbers to and from fp32.

struct F32 {
  using Stored = float;
  using Prepared = float;
  static constexpr int kStep = kLanes;
  INLINE Floats load(const float* p) { return *reinterpret_cast<const LooseFloats*>(p); }
  INLINE void store(float* p, Floats v) { *reinterpret_cast<LooseFloats*>(p) = v; }
  INLINE void store_prepared(float* p, const float* from) { store(p, load(from)); }
  INLINE Floats load_weight(const float* p, int64_t) { return load(p); }
  INLINE Floats load_input(const float* p, int64_t) { return load(p); }
  INLINE Floats multiply_add(Floats sum, Floats w, Floats x) { return sum + w * x; }
};

struct BF16 {
  using Stored = uint16_t;
  using Prepared = float;
  static constexpr int kStep = kLanes;
  INLINE Floats load(const uint16_t* p) {
    Words wide = __builtin_convertvector(*reinterpret_cast<const LooseHalves*>(p), Words);
    return (Floats)(wide << 16);
  }
  INLINE void store(uint16_t* p, Floats v) {
    Words bits = (Words)v;
    Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    Words quiet = (bits >> 16) | 0x40u;
    Words is_nan = (Words)(v != v);
    rounded = (is_nan & quiet) | (~is_nan & rounded);
    *reinterpret_cast<LooseHalves*>(p) = __builtin_convertvector(rounded, Halves);
  }
  INLINE void store_prepared(float* p, const uint16_t* from) { F32::store(p, load(from)); }
  INLINE Floats load_weight(const uint16_t* p, int64_t) { return load(p); }
  INLINE Floats load_input(const float* p, int64_t) { return F32::load(p); }
  INLINE Floats multiply_add(Floats sum, Floats w, Floats x) { return sum + w * x; }
};

#if ISA_F16
struct F16 {
  using Stored = uint16_t;
  using Prepared = float;
  static constexpr int kStep = kLanes;
#if VECTOR_BYTES == 64
  INLINE Floats load(const uint16_t* p) {
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  INLINE void store(uint16_t* p, Floats v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, 0));
  }
#else
  INLINE Floats load(const uint16_t* p) {
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  INLINE void store(uint16_t* p, Floats v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, 0));
  }
#endif
  INLINE void store_prepared(float* p, const uint16_t* from) { F32::store(p, load(from)); }
  INLINE Floats load_weight(const uint16_t* p, int64_t) { return load(p); }
  INLINE Floats load_input(const float* p, int64_t) { return F32::load(p); }
  INLINE Floats multiply_add(Floats sum, Floats w, Floats x) { return sum + w * x; }
};
#endif

#if ISA_DOT
// Pairs of bfloat16 multiplied and added in fp32 by one instruction; x stays as it is.
struct Dot : BF16 {
  using Prepared = uint16_t;
  static constexpr int kStep = 2 * kLanes;
  INLINE void store_prepared(uint16_t* p, const uint16_t* from) { memcpy(p, from, kLanes * 2); }
  // A block may be 16 wide, half a vector: the other half is zeros.
  INLINE Words load_pairs(const uint16_t* p, int64_t left) {
    if (left < kStep) {
      return (Words)_mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    return (Words)_mm512_loadu_si512(p);
  }
  INLINE Words load_weight(const uint16_t* p, int64_t left) { return load_pairs(p, left); }
  INLINE Words load_input(const uint16_t* p, int64_t left) { return load_pairs(p, left); }
  INLINE Floats multiply_add(Floats sum, Words w, Words x) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x);
  }
};
#endif

// Half of the lanes become sums of `a`, half of `b`: lane i holds the sum of lanes i and i ^ D.
template <int D>
INLINE Floats fold(Floats a, Floats b) {
  Ints kept, other;
  for (int i = 0; i < kLanes; i++) {
    kept[i] = (i & D) ? kLanes + i : i;
    other[i] = (i & D) ? kLanes + (i ^ D) : i ^ D;
  }
  return SHUFFLE(a, b, kept) + SHUFFLE(a, b, other);
}

// Sums over the lanes of up to kLanes vectors; lane i of the result is the sum of vector i.
template <int D, int COUNT>
INLINE Floats sum_lanes(const Floats* sums) {
  if constexpr (D == kLanes) {
    return sums[0];
  } else {
    constexpr int kHalf = (COUNT + 1) / 2;
    Floats halves[kHalf];
    for (int i = 0; i < kHalf; i++) {
      halves[i] = fold<D>(sums[2 * i], 2 * i + 1 < COUNT ? sums[2 * i + 1] : sums[2 * i]);
    }
    return sum_lanes<2 * D, kHalf>(halves);
  }
}

template <int COUNT>
INLINE void write_sums(const Floats* sums, float* out) {
  if constexpr (COUNT > kLanes) {
    F32::store(out, sum_lanes<1, kLanes>(sums));
    write_sums<COUNT - kLanes>(sums + kLanes, out + kLanes);
  } else if constexpr (COUNT > 0) {
    F32::store(out, sum_lanes<1, COUNT>(sums));
  }
}

// out[m * columns_of_out + n] for ROWS rows of x and COLUMNS rows of the weight.
template <class T, int ROWS, int COLUMNS>
ISA_TARGET void tile(const void* x_start, int64_t x_row, int64_t x_column, const void* w_start,
                     const int32_t* column, int64_t count, int64_t block_size, int64_t width,
                     float* out, int64_t out_row) {
  const auto* x = static_cast<const typename T::Prepared*>(x_start);
  const auto* w = static_cast<const typename T::Stored*>(w_start);
  Floats sums[ROWS * COLUMNS];
  for (int i = 0; i < ROWS * COLUMNS; i++) sums[i] = Floats{};
  for (int64_t j = 0; j < count; j++, w += block_size) {
    const auto* x_block = x + column[j] * x_column;
    for (int64_t k = 0; k < width; k += T::kStep) {
      decltype(T::load_weight(w, 0)) weights[COLUMNS];
#pragma GCC unroll 16
      for (int n = 0; n < COLUMNS; n++) weights[n] = T::load_weight(w + n * width + k, width - k);
#pragma GCC unroll 16
      for (int m = 0; m < ROWS; m++) {
        const auto input = T::load_input(x_block + m * x_row + k, width - k);
#pragma GCC unroll 16
        for (int n = 0; n < COLUMNS; n++) {
          sums[m * COLUMNS + n] = T::multiply_add(sums[m * COLUMNS + n], weights[n], input);
        }
      }
    }
  }
  float flat[(ROWS * COLUMNS + kLanes - 1) / kLanes * kLanes];
  write_sums<ROWS * COLUMNS>(sums, flat);
  for (int m = 0; m < ROWS; m++) memcpy(out + m * out_row, flat + m * COLUMNS, COLUMNS * 4);
}

template <class T>
ISA_TARGET void prepare(const void* x, void* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    T::store_prepared(static_cast<typename T::Prepared*>(out) + i,
                      static_cast<const typename T::Stored*>(x) + i);
  }
}

template <class T>
ISA_TARGET void finish(const float* sums, const void* bias, void* y, int64_t count) {
  const auto* offsets = static_cast<const typename T::Stored*>(bias);
  for (int64_t i = 0; i < count; i += kLanes) {
    Floats v = F32::load(sums + i);
    if (bias) v += T::load(offsets + i);
    T::store(static_cast<typename T::Stored*>(y) + i, v);
  }
}

// e^v by a polynomial on [-ln 2 / 2, ln 2 / 2] (its Taylor series; the error is below 1 ulp of
// fp32 there) and a shift of the exponent. NaN stays NaN.
INLINE Floats exponential(Floats v) {
  const Floats clipped = v > 88.f ? 88.f - Floats{} : (v < -87.f ? -87.f - Floats{} : v);
  const Floats shifted = clipped * 1.44269504f + 12582912.f;  // 1.5 * 2^23 rounds to an integer
  const Floats power = shifted - 12582912.f;
  const Floats r = (clipped - power * 0.693359375f) + power * 2.12194440e-4f;
  Floats p = r * (1.f / 5040) + 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + .5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  const Ints exponent = __builtin_convertvector(power, Ints) + 127;
  const Floats scale = (Floats)(exponent << 23);
  return v != v ? v : p * scale;
}

template <class T>
ISA_TARGET void finish_swiglu(const float* gate, const float* up, void* y, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats g = F32::load(gate + i);
    const Floats silu = g / (1.f + exponential(-g));
    T::store(static_cast<typename T::Stored*>(y) + i, silu * F32::load(up + i));
  }
}

template <class T>
Kernels kernels() {
  Kernels table{};
  table.prepared_bytes = sizeof(typename T::Prepared);
  table.stored_bytes = sizeof(typename T::Stored);
  table.is_prepared = std::is_same_v<typename T::Prepared, typename T::Stored>;
  table.tile_rows = TILE_ROWS;
  table.single = tile<T, 1, 8>;
  table.tiles[1] = tile<T, 1, 4>;
  table.tiles[2] = tile<T, 2, 4>;
  table.tiles[3] = tile<T, 3, 4>;
#if TILE_ROWS > 3
  table.tiles[4] = tile<T, 4, 4>;
  table.tiles[5] = tile<T, 5, 4>;
  table.tiles[6] = tile<T, 6, 4>;
#endif
  table.prepare = prepare<T>;
  table.finish = finish<T>;
  table.finish_swiglu = finish_swiglu<T>;
  return table;
}

#undef INLINE
}  // namespace ISA

#undef ISA
#undef ISA_TARGET
#undef VECTOR_BYTES
#undef TILE_ROWS
#undef ISA_F16
#undef ISA_DOT
