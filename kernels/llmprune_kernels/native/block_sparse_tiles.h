// The inner loops for one instruction set; block_sparse.cpp includes this file once for each.
//
// The including file defines ISA (a namespace), ISA_TARGET (a function attribute), VECTOR_BYTES,
// ISA_REGISTERS (vector registers), ISA_F16 (has half-precision conversions) and ISA_DOT (has
// bfloat16 dot products). Every function here carries ISA_TARGET, also those that are inlined: a
// compiler lowers wide vectors before it inlines.
//
// Few rows of x: `tile`, lanes run along in_features. A tile is up to ROWS x COLUMNS dot products,
// each one vector of partial sums that stays in a register over all blocks of a block row and is
// summed over its lanes once, at the end. Nothing is packed but the widening of x.
// Many rows: `panel_tile`, lanes are rows of x, packed and transposed once a call; numbers of the
// weight are spread over all lanes. No sums over lanes, and a block is many more instructions.
// Both: the order of the additions of one output depends on nothing but its block row.

namespace ISA {

constexpr int kLanes = VECTOR_BYTES / 4;
typedef float Floats __attribute__((vector_size(VECTOR_BYTES)));
typedef float LooseFloats __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef uint16_t LooseHalves __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));

#define INLINE ISA_TARGET static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")

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

// Half of the lanes become sums of `a`, half of `b`: lane i holds the sum of lanes i and i ^ D.
template <int D>
INLINE Floats fold(Floats a, Floats b) {
  return shuffle<Same<D>>(a, b) + shuffle<Other<D>>(a, b);
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

// Asks for `bytes` of memory before they are needed.
INLINE void prefetch(const void* start, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) {
    __builtin_prefetch(static_cast<const char*>(start) + at, 0, 3);
  }
}

// out[m * out_row + n] for ROWS rows of x and COLUMNS rows of the weight.
template <class T, int ROWS, int COLUMNS>
ISA_TARGET void tile(const TileCall& call, const void* x_start, const void* w_start, float* out) {
  const auto* x = static_cast<const typename T::Prepared*>(x_start);
  const auto* w = static_cast<const typename T::Stored*>(w_start);
  const int64_t width = call.width, x_row = call.x_row;
  Floats sums[ROWS * COLUMNS];
  for (int i = 0; i < ROWS * COLUMNS; i++) sums[i] = Floats{};
  for (int64_t j = 0; j < call.count; j++, w += call.block_size) {
    const auto* x_block = x + call.column[j] * width;
    for (int64_t k = 0; k < width; k += T::kStep) {
      decltype(T::load_weight(w, 0)) weights[COLUMNS];
      UNROLL for (int n = 0; n < COLUMNS; n++) {
        weights[n] = T::load_weight(w + n * width + k, width - k);
      }
      UNROLL for (int m = 0; m < ROWS; m++) {
        const auto input = T::load_input(x_block + m * x_row + k, width - k);
        UNROLL for (int n = 0; n < COLUMNS; n++) {
          sums[m * COLUMNS + n] = T::multiply_add(sums[m * COLUMNS + n], weights[n], input);
        }
      }
    }
  }
  float flat[(ROWS * COLUMNS + kLanes - 1) / kLanes * kLanes];
  write_sums<ROWS * COLUMNS>(sums, flat);
  for (int m = 0; m < ROWS; m++) memcpy(out + m * call.out_row, flat + m * COLUMNS, COLUMNS * 4);
}

template <class T>
ISA_TARGET void prepare(const void* x, void* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    T::store_prepared(static_cast<typename T::Prepared*>(out) + i,
                      static_cast<const typename T::Stored*>(x) + i);
  }
}

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

// Packs `count` rows of x, at most kLanes, as one of `vectors`: [units of a row][vectors][lanes].
template <class T>
ISA_TARGET void pack_panel(const void* x_start, int64_t x_stride, int64_t count, int64_t width,
                           int64_t vectors, void* out_start) {
  const auto* x = static_cast<const typename T::Stored*>(x_start);
  auto* out = static_cast<float*>(out_start);
  constexpr int kTaken = kLanes * (4 / sizeof(typename T::Prepared));
  for (int64_t k = 0; k < width; k += kTaken) {
    Floats v[kLanes];
    for (int m = 0; m < kLanes; m++) {
      v[m] = m < count ? T::load_units(x + m * x_stride + k, width - k) : Floats{};
    }
    transpose<1>(v);
    for (int i = 0; i < kLanes; i++, out += vectors * kLanes) F32::store(out, v[i]);
  }
}

// out[m * rows + n] = in[n * vectors * kLanes + m]
ISA_TARGET void unpack_panel(const float* in, int64_t vectors, int64_t rows, float* out) {
  for (int64_t m = 0; m < vectors * kLanes; m += kLanes) {
    for (int64_t n = 0; n < rows; n += kLanes) {
      Floats v[kLanes];
      for (int i = 0; i < kLanes; i++) v[i] = F32::load(in + (n + i) * vectors * kLanes + m);
      transpose<1>(v);
      for (int i = 0; i < kLanes; i++) F32::store(out + (m + i) * rows + n, v[i]);
    }
  }
}

// out[n * VECTORS * kLanes + m] for COLUMNS outputs n: rows of the weight, or its columns.
template <class T, int VECTORS, int COLUMNS, bool TRANSPOSED>
ISA_TARGET void panel_tile(const PanelCall& call, const void* x_start, const void* w_start,
                           float* out) {
  using Unit = typename T::Unit;
  using Spread = decltype(T::spread(Unit{}));
  constexpr bool kMade = T::kScratch || (TRANSPOSED && sizeof(typename T::Stored) == 2);
  constexpr int64_t kPerUnit = 4 / sizeof(typename T::Prepared);
  const int64_t num_units = (TRANSPOSED ? call.height : call.width) / kPerUnit;
  // Unit k of output n is at n * to_next + k * down.
  const int64_t to_next = TRANSPOSED ? 1 : num_units;
  const int64_t down = !TRANSPOSED ? 1 : kMade ? COLUMNS : call.width;
  // Four KiB of the weight ahead, 1 to 4 blocks: it may come from memory, and lies in pieces too
  // short for a processor to see where the next one is.
  const int64_t taken = COLUMNS * call.width * sizeof(typename T::Stored);
  const int64_t ahead = taken > 2048 ? 1 : taken > 1024 ? 2 : 4;
  Unit made[kMade ? COLUMNS * kMaxSide : 1];
  Floats sums[COLUMNS * VECTORS];
  UNROLL for (int i = 0; i < COLUMNS * VECTORS; i++) sums[i] = Floats{};
  int64_t chain = 0;
  bool is_first = true;
  for (int64_t j = 0; j < call.count; j++) {
    const auto* w = static_cast<const typename T::Stored*>(w_start) +
                    (TRANSPOSED ? call.place[j] : j) * call.block_size;
    if (j + ahead < call.count) {
      const auto* next = static_cast<const typename T::Stored*>(w_start) +
                         (TRANSPOSED ? call.place[j + ahead] : j + ahead) * call.block_size;
      if constexpr (TRANSPOSED) {
        for (int64_t n = 0; n < call.height; n++) prefetch(next + n * call.width, 1);
      } else {
        prefetch(next, taken);
      }
    }
    const Unit* units = reinterpret_cast<const Unit*>(w);
    if constexpr (kMade) {
      if constexpr (TRANSPOSED) {
        T::make_transposed(w, call.height, call.width, COLUMNS, made);
      } else {
        T::make(w, COLUMNS * call.width, made);
      }
      units = made;
    }
    const Unit* x =
        static_cast<const Unit*>(x_start) + call.column[j] * num_units * VECTORS * kLanes;
    for (int64_t k = 0; k < num_units; k++, x += VECTORS * kLanes) {
      Spread inputs[VECTORS];
      UNROLL for (int v = 0; v < VECTORS; v++) {
        inputs[v] = *reinterpret_cast<const Spread*>(x + v * kLanes);
      }
      UNROLL for (int n = 0; n < COLUMNS; n++) {
        const Spread weight = T::spread(units[n * to_next + k * down]);
        UNROLL for (int v = 0; v < VECTORS; v++) {
          sums[n * VECTORS + v] = T::multiply_add(sums[n * VECTORS + v], weight, inputs[v]);
        }
      }
    }
    chain += num_units;
    if (chain >= T::kChain && j + 1 < call.count) {
      UNROLL for (int i = 0; i < COLUMNS * VECTORS; i++) {
        F32::store(out + i * kLanes, is_first ? sums[i] : F32::load(out + i * kLanes) + sums[i]);
        sums[i] = Floats{};
      }
      chain = 0;
      is_first = false;
    }
  }
  UNROLL for (int i = 0; i < COLUMNS * VECTORS; i++) {
    F32::store(out + i * kLanes, is_first ? sums[i] : F32::load(out + i * kLanes) + sums[i]);
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

// e^v: the Taylor polynomial on [-ln 2 / 2, ln 2 / 2], where it is below 1 ulp of fp32 off, and a
// shift of the exponent. ln 2 is taken off in two parts, the first exact. NaN stays NaN.
INLINE Floats exponential(Floats v) {
  const Floats most = 88.f - Floats{}, least = -87.f - Floats{};
  const Floats clipped = v > most ? most : (v < least ? least : v);
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
  const Floats power = (clipped * 1.44269504f + 12582912.f) - 12582912.f;
  const Floats r = (clipped - power * 0.693359375f) + power * 2.12194440e-4f;
  Floats p = r * (1.f / 5040) + 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + .5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  const Ints exponent = __builtin_convertvector(power, Ints) + 127;
  return v != v ? v : p * (Floats)(exponent << 23);
}

template <class T>
ISA_TARGET void finish_swiglu(const float* gate, const float* up, void* y, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats g = F32::load(gate + i);
    const Floats silu = g / (1.f + exponential(-g));
    T::store(static_cast<typename T::Stored*>(y) + i, silu * F32::load(up + i));
  }
}

template <class T, int VECTORS, int COLUMNS>
void add_panels(Kernels& table) {
  table.panel_columns[VECTORS] = COLUMNS;
  table.panels[0][VECTORS] = panel_tile<T, VECTORS, COLUMNS, false>;
  table.panels[1][VECTORS] = panel_tile<T, VECTORS, COLUMNS, true>;
}

template <class T>
Kernels kernels() {
  Kernels table{};
  table.stored_bytes = sizeof(typename T::Stored);
  table.prepared_bytes = sizeof(typename T::Prepared);
  table.is_prepared = std::is_same_v<typename T::Prepared, typename T::Stored>;
  table.lanes = kLanes;
  table.tile_columns[2] = table.tile_columns[3] = 4;
  table.tiles[2] = tile<T, 2, 4>;
  table.tiles[3] = tile<T, 3, 4>;
#if ISA_REGISTERS == 32
  table.tile_rows = 6;
  table.tile_columns[1] = 16;
  table.tiles[1] = tile<T, 1, 16>;
  table.tile_columns[4] = table.tile_columns[5] = table.tile_columns[6] = 4;
  table.tiles[4] = tile<T, 4, 4>;
  table.tiles[5] = tile<T, 5, 4>;
  table.tiles[6] = tile<T, 6, 4>;
  add_panels<T, 1, 16>(table);
  add_panels<T, 2, 8>(table);
  add_panels<T, 3, 8>(table);
#else
  table.tile_rows = 3;
  table.tile_columns[1] = 8;
  table.tiles[1] = tile<T, 1, 8>;
  add_panels<T, 1, 8>(table);
  add_panels<T, 2, 4>(table);
  add_panels<T, 3, 4>(table);
#endif
  table.prepare = prepare<T>;
  table.pack_panel = pack_panel<T>;
  table.unpack_panel = unpack_panel;
  table.finish = finish<T>;
  table.finish_swiglu = finish_swiglu<T>;
  return table;
}

#undef INLINE
#undef UNROLL
}  // namespace ISA

#undef ISA
#undef ISA_TARGET
#undef VECTOR_BYTES
#undef ISA_REGISTERS
#undef ISA_F16
#undef ISA_DOT
