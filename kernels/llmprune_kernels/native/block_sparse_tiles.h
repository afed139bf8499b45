// The inner loops for one instruction set; block_sparse.cpp includes this file once for each.
//
// Few rows of x: `tile`, lanes run along in_features. A tile is up to ROWS x COLUMNS dot products,
// each one vector of partial sums that stays in a register over all blocks of a block row and is
// summed over its lanes once, at the end. Nothing is packed but the widening of x.
// Many rows: `panel_tile`, lanes are rows of x, packed and transposed once a call; numbers of the
// weight are spread over all lanes. No sums over lanes, and a block is many more instructions.
// Both: the additions of one output have one order, whatever the threads and the other rows are.

#include "block_sparse_elements.h"

namespace ISA {

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
  // What the next call takes, or four KiB ahead, 1 to 4 blocks: the weight may come from memory, and
  // lies in pieces too short for a processor to see where the next one is. Asked for a line at a
  // time, while another block is multiplied: all at once they wait for one another.
  const int64_t taken = COLUMNS * call.width * sizeof(typename T::Stored);
  const int64_t fitting = taken > 2048 ? 1 : taken > 1024 ? 2 : 4;
  const int64_t ahead = call.count < call.left ? call.count : fitting;
  const int64_t line_step =
      (TRANSPOSED ? call.width : COLUMNS) * kPerUnit * sizeof(typename T::Stored);
  Unit made[kMade ? COLUMNS * kMaxSide : 1];
  Floats sums[COLUMNS * VECTORS];
  UNROLL for (int i = 0; i < COLUMNS * VECTORS; i++) sums[i] = Floats{};
  int64_t chain = 0;
  bool is_first = call.is_first;
  for (int64_t j = 0; j < call.count; j++) {
    const auto* w = static_cast<const typename T::Stored*>(w_start) +
                    (TRANSPOSED ? call.place[j] : j) * call.block_size;
    const auto* next = w;
    if (j + ahead < call.left) {
      next = static_cast<const typename T::Stored*>(w_start) +
             (TRANSPOSED ? call.place[j + ahead] : j + ahead) * call.block_size;
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
      __builtin_prefetch(reinterpret_cast<const char*>(next) + k * line_step, 0, 3);
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

#if ISA_DOT
// Row n of sums, or silu(sums) * up, of 16 rows of x.
INLINE Floats finished(const float* sums, const float* up, const uint16_t* bias, int64_t n) {
  const Floats v = F32::load(sums + n * kLanes);
  if (up) return v / (1.f + exponential(-v)) * F32::load(up + n * kLanes);
  return bias ? v + Dot::widen(bias[n]) : v;
}

// A whole vector of pairs of bfloat16, or the lower half.
INLINE void store_pairs(uint16_t* p, Floats v, int count) {
  if (count == kLanes) {
    _mm512_storeu_si512(p, (__m512i)v);
  } else {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256((__m512i)v));
  }
}

// Sums of 16 rows of x, [output][row], rounded to bfloat16 and written as `rows` rows of y. They
// are rounded as `finish` does, but for numbers below the normal ones, which become zero.
ISA_TARGET void write_tiles(const float* sums, const float* up, const uint16_t* bias,
                            int64_t outputs, int64_t rows, uint16_t* y, int64_t y_row) {
  const __m512i pairs = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  for (int64_t n = 0; n < outputs; n += 2 * kLanes) {
    const int count = outputs - n < 2 * kLanes ? kLanes / 2 : kLanes;
    Floats v[kLanes];
    for (int i = 0; i < kLanes; i++) v[i] = Floats{};
    for (int i = 0; i < count; i++) {
      const Floats even = finished(sums, up, bias, n + 2 * i);
      const Floats odd = finished(sums, up, bias, n + 2 * i + 1);
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
      v[i] = (Floats)_mm512_permutexvar_epi16(pairs, both);
    }
    transpose<1>(v);
    for (int64_t m = 0; m < rows; m++) store_pairs(y + m * y_row + n, v[m], count);
  }
}

INLINE Words load_words(const uint16_t* p) {
  return __builtin_convertvector(*reinterpret_cast<const LooseHalves*>(p), Words);
}

// A block of `height` rows of `width` numbers as `width` rows of `height` numbers.
ISA_TARGET void transpose_block(const uint16_t* w, int64_t height, int64_t width, uint16_t* out) {
  const int count = height < 2 * kLanes ? kLanes / 2 : kLanes;
  for (int64_t n = 0; n < height; n += 2 * kLanes) {
    for (int64_t k = 0; k < width; k += kLanes) {
      Floats v[kLanes];
      for (int i = 0; i < kLanes; i++) v[i] = Floats{};
      for (int i = 0; i < count; i++) {
        const uint16_t* row = w + (n + 2 * i) * width + k;
        v[i] = (Floats)(Words)(load_words(row) | load_words(row + width) << 16);
      }
      transpose<1>(v);
      for (int i = 0; i < kLanes; i++) store_pairs(out + (k + i) * height + n, v[i], count);
    }
  }
}
#endif

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
  table.chain = T::kChain;
  // One row too: with 16 outputs there are more sums at one time, but lines of a weight are read in
  // an order that a processor does not see coming (1.6 times as long where they are in memory).
  table.tile_columns[1] = table.tile_columns[2] = table.tile_columns[3] = 4;
  table.tiles[1] = tile<T, 1, 4>;
  table.tiles[2] = tile<T, 2, 4>;
  table.tiles[3] = tile<T, 3, 4>;
#if ISA_REGISTERS == 32
  table.tile_rows = 6;
  table.part_columns = 16;
  table.tile_columns[4] = table.tile_columns[5] = table.tile_columns[6] = 4;
  table.tiles[4] = tile<T, 4, 4>;
  table.tiles[5] = tile<T, 5, 4>;
  table.tiles[6] = tile<T, 6, 4>;
  add_panels<T, 1, 16>(table);
  add_panels<T, 2, 8>(table);
  add_panels<T, 3, 8>(table);
#else
  table.tile_rows = 3;
  table.part_columns = 8;
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

}  // namespace ISA

#undef INLINE
#undef UNROLL
#undef ISA
#undef ISA_TARGET
#undef VECTOR_BYTES
#undef ISA_REGISTERS
#undef ISA_F16
#undef ISA_DOT
