// Vectors, element types and shuffles of one instruction set, for block_sparse_tiles.h.
//
// block_sparse.cpp defines ISA (a namespace), ISA_TARGET (a function attribute), VECTOR_BYTES,
// ISA_REGISTERS (vector registers), ISA_F16 (has half-precision conversions) and ISA_DOT (has
// bfloat16 dot products). Every function here carries ISA_TARGET, also those that are inlined: a
// compiler lowers wide vectors before it inlines.

#define INLINE ISA_TARGET static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")

namespace ISA {

constexpr int kLanes = VECTOR_BYTES / 4;
typedef float Floats __attribute__((vector_size(VECTOR_BYTES)));
typedef float LooseFloats __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef uint16_t LooseHalves __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));

// Element types. Stored: in memory; Prepared: x in a tile; Unit: 4 bytes of a panel, one number or
// a pair; kStep: numbers that one multiply-add takes along in_features; kScratch: whether units of
// a weight must be made before they can be spread.

struct F32 {
  using Stored = float;
  using Prepared = float;
  using Unit = float;
  static constexpr int kStep = kLanes;
  static constexpr bool kScratch = false;
  // Sums of a panel are one chain of additions each. Chains of this many numbers, added up, keep
  // the error of fp32 near that of a dense product.
  static constexpr int64_t kChain = 128;
  INLINE Floats load(const float* p) { return *reinterpret_cast<const LooseFloats*>(p); }
  INLINE void store(float* p, Floats v) { *reinterpret_cast<LooseFloats*>(p) = v; }
  INLINE void store_prepared(float* p, const float* from) { store(p, load(from)); }
  INLINE Floats load_weight(const float* p, int64_t) { return load(p); }
  INLINE Floats load_input(const float* p, int64_t) { return load(p); }
  INLINE Floats load_units(const float* p, int64_t) { return load(p); }
  INLINE Floats spread(float unit) { return unit - Floats{}; }
  INLINE Floats multiply_add(Floats sum, Floats w, Floats x) { return sum + w * x; }
};

// Numbers of 16 bits that are widened to fp32 before anything else; OWN has load and store.
template <class OWN>
struct Widened {
  using Stored = uint16_t;
  using Prepared = float;
  using Unit = float;
  static constexpr int kStep = kLanes;
  static constexpr bool kScratch = true;
  static constexpr int64_t kChain = INT64_MAX;
  INLINE void store_prepared(float* p, const uint16_t* from) { F32::store(p, OWN::load(from)); }
  INLINE Floats load_weight(const uint16_t* p, int64_t) { return OWN::load(p); }
  INLINE Floats load_input(const float* p, int64_t) { return F32::load(p); }
  INLINE Floats load_units(const uint16_t* p, int64_t) { return OWN::load(p); }
  INLINE Floats spread(float unit) { return unit - Floats{}; }
  INLINE Floats multiply_add(Floats sum, Floats w, Floats x) { return sum + w * x; }
  // Units [number][column] of `columns` columns of a block of `height` rows of `width` numbers.
  INLINE void make_transposed(const uint16_t* w, int64_t height, int64_t width, int64_t columns,
                              float* units) {
    for (int64_t n = 0; n < height; n++, w += width, units += columns) {
      for (int64_t i = 0; i < columns; i++) units[i] = OWN::widen(w[i]);
    }
  }
  INLINE void make(const uint16_t* w, int64_t count, float* units) {
    for (int64_t i = 0; i < count; i += kLanes) F32::store(units + i, OWN::load(w + i));
  }
};

struct BF16 : Widened<BF16> {
  INLINE float widen(uint16_t number) {
    const uint32_t bits = static_cast<uint32_t>(number) << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
  }
  INLINE Floats load(const uint16_t* p) {
    const Words wide = __builtin_convertvector(*reinterpret_cast<const LooseHalves*>(p), Words);
    return (Floats)(wide << 16);
  }
  // Round to nearest, ties to even. A NaN is the processor's or was a bfloat16: its lower half is
  // zero, and it stays NaN.
  INLINE void store(uint16_t* p, Floats v) {
    const Words bits = (Words)v;
    const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    *reinterpret_cast<LooseHalves*>(p) = __builtin_convertvector(rounded, Halves);
  }
};

#if ISA_F16
struct F16 : Widened<F16> {
  INLINE float widen(uint16_t number) { return _cvtsh_ss(number); }
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
};
#endif

#if ISA_DOT
// Pairs of bfloat16 multiplied and added in fp32 by one instruction; x stays as it is.
struct Dot : BF16 {
  using Prepared = uint16_t;
  using Unit = uint32_t;
  static constexpr int kStep = 2 * kLanes;
  static constexpr bool kScratch = false;
  // A block may be 16 wide, half a vector: the other half is zeros.
  INLINE Words load_pairs(const uint16_t* p, int64_t left) {
    if (left < kStep) {
      return (Words)_mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    return (Words)_mm512_loadu_si512(p);
  }
  INLINE void store_prepared(uint16_t* p, const uint16_t* from) { memcpy(p, from, kLanes * 2); }
  INLINE Words load_weight(const uint16_t* p, int64_t left) { return load_pairs(p, left); }
  INLINE Words load_input(const uint16_t* p, int64_t left) { return load_pairs(p, left); }
  INLINE Floats load_units(const uint16_t* p, int64_t left) { return (Floats)load_pairs(p, left); }
  INLINE Words spread(uint32_t unit) { return unit - Words{}; }
  INLINE Floats multiply_add(Floats sum, Words w, Words x) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x);
  }
  INLINE void make_transposed(const uint16_t* w, int64_t height, int64_t width, int64_t columns,
                              uint32_t* units) {
    for (int64_t n = 0; n < height; n += 2, w += 2 * width, units += columns) {
      for (int64_t i = 0; i < columns; i++) {
        units[i] = w[i] | static_cast<uint32_t>(w[width + i]) << 16;
      }
    }
  }
};
#endif

// Lanes of two vectors: LANES::at(i) is the place in the pair that lane i comes from.
template <class LANES, size_t... I>
INLINE Floats shuffle(Floats a, Floats b, std::index_sequence<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, LANES::at(I)...);
#else
  return __builtin_shuffle(a, b, Ints{LANES::at(I)...});
#endif
}

template <class LANES>
INLINE Floats shuffle(Floats a, Floats b) {
  return shuffle<LANES>(a, b, std::make_index_sequence<kLanes>{});
}

// Lane i, or lane i ^ D, of the first vector where bit D of i is off, of the second where it is on.
template <int D>
struct Same {
  static constexpr int at(int i) { return (i & D) ? kLanes + i : i; }
};
template <int D>
struct Other {
  static constexpr int at(int i) { return (i & D) ? kLanes + (i ^ D) : i ^ D; }
};
// As one step of a transposition takes them.
template <int D>
struct Low {
  static constexpr int at(int i) { return (i & D) ? kLanes + (i ^ D) : i; }
};
template <int D>
struct High {
  static constexpr int at(int i) { return (i & D) ? kLanes + i : i ^ D; }
};

// Rows become columns: kLanes vectors of kLanes numbers, in place.
template <int D>
INLINE void transpose(Floats* v) {
  if constexpr (D < kLanes) {
    UNROLL for (int i = 0; i < kLanes; i++) {
      if (i & D) continue;
      const Floats a = v[i], b = v[i | D];
      v[i] = shuffle<Low<D>>(a, b);
      v[i | D] = shuffle<High<D>>(a, b);
    }
    transpose<2 * D>(v);
  }
}

}  // namespace ISA
