// y = x W^T for a weight stored in blocks, on a CPU: one C function for each product.
//
// Plain C interface and no header of PyTorch: it builds in seconds and one build serves every
// version of PyTorch. Threads are OpenMP's, so they are those that PyTorch itself uses.
// The best instruction set is chosen when a function is called, never when it is compiled.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__x86_64__)
#define IS_X86 1
#include <immintrin.h>
#else
#define IS_X86 0
#endif

#if defined(__clang__)
#error "shuffles"
#else
#define SHUFFLE(a, b, lanes) __builtin_shuffle(a, b, lanes)
#endif

namespace {

#define EXPORT __attribute__((visibility("default")))

constexpr int kMaxTileRows = 6;
constexpr int kMaxSide = 128;

using Tile = void (*)(const void* x, int64_t x_row, int64_t x_column, const void* w,
                      const int32_t* column, int64_t count, int64_t block_size, int64_t width,
                      float* out, int64_t out_row);

// What one instruction set offers for one element type.
struct Kernels {
  int64_t stored_bytes, prepared_bytes;
  bool is_prepared;  // x can be read as it is
  int64_t tile_rows;
  Tile single;  // one row of x, eight of the weight
  Tile tiles[kMaxTileRows + 1];  // by rows of x, four of the weight
  void (*prepare)(const void* x, void* out, int64_t count);
  void (*finish)(const float* sums, const void* bias, void* y, int64_t count);
  void (*finish_swiglu)(const float* gate, const float* up, void* y, int64_t count);
};

#define ISA portable
#define ISA_TARGET
#define VECTOR_BYTES 16
#define TILE_ROWS 3
#define ISA_F16 0
#define ISA_DOT 0
#include "block_sparse_tiles.h"

#if IS_X86
#define ISA avx2
#define ISA_TARGET __attribute__((target("avx2,fma,f16c")))
#define VECTOR_BYTES 32
#define TILE_ROWS 3
#define ISA_F16 1
#define ISA_DOT 0
#include "block_sparse_tiles.h"

#define ISA avx512
#define ISA_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))
#define VECTOR_BYTES 64
#define TILE_ROWS 6
#define ISA_F16 1
#define ISA_DOT 0
#include "block_sparse_tiles.h"

#define ISA avx512_bf16
#define ISA_TARGET \
  __attribute__((target("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))
#define VECTOR_BYTES 64
#define TILE_ROWS 6
#define ISA_F16 1
#define ISA_DOT 1
#include "block_sparse_tiles.h"
#endif

// One weight: its blocks, and where they are.
struct Weight {
  const void* values;
  const int32_t* row_pointer;
  const int32_t* column;
};

struct Problem {
  const void* x;
  int64_t x_stride, num_rows, in_features;
  int64_t block_rows, rows, columns;  // block rows of the weight; sides of a block
  Weight weights[2];
  int64_t num_weights;  // 2: silu(x W0^T) * (x W1^T)
  const void* bias;
  void* y;
};

int64_t kPanelRows = 96;
int64_t kGroupRows = 24;
constexpr int64_t kMaxGroupRows = 96;
int64_t kDirectRows = 6;

// Rows of x as the tiles read them: in place, or packed tile by tile.
struct Input {
  const char* start;
  bool is_packed;
  int64_t stride, in_features, width, tile_rows, num_rows, bytes;

  void set(int64_t row, int64_t count, const void** x, int64_t* x_row, int64_t* x_column) const {
    *x = start + row * (is_packed ? in_features : stride) * bytes;
    *x_row = is_packed ? width : stride;
    *x_column = is_packed ? count * width : width;
  }
};

void pack_tile(const Kernels& kernels, const Problem& p, int64_t first, int64_t count, char* out) {
  const char* x = static_cast<const char*>(p.x);
  for (int64_t column = 0; column < p.in_features; column += p.columns) {
    for (int64_t m = 0; m < count; m++) {
      kernels.prepare(x + ((first + m) * p.x_stride + column) * kernels.stored_bytes, out,
                      p.columns);
      out += p.columns * kernels.prepared_bytes;
    }
  }
}

// Sums of one block row for rows `first` to `last` of x, in out[row - first][rows].
void sum_block_row(const Kernels& kernels, const Problem& p, const Weight& weight,
                   const Input& input, int64_t block_row, int64_t first, int64_t last,
                   float* out) {
  const int64_t begin = weight.row_pointer[block_row];
  const int64_t count = weight.row_pointer[block_row + 1] - begin;
  const int64_t block_size = p.rows * p.columns;
  const char* w = static_cast<const char*>(weight.values) +
                  begin * block_size * kernels.stored_bytes;
  const bool is_single = last - first == 1;
  const int64_t step = is_single ? 8 : 4;
  for (int64_t n = 0; n < p.rows; n += step) {
    for (int64_t m = first; m < last; m += kernels.tile_rows) {
      const int64_t tile = last - m < kernels.tile_rows ? last - m : kernels.tile_rows;
      const void* x;
      int64_t x_row, x_column;
      input.set(m, tile, &x, &x_row, &x_column);
      (is_single ? kernels.single : kernels.tiles[tile])(
          x, x_row, x_column, w + n * p.columns * kernels.stored_bytes, weight.column + begin,
          count, block_size, p.columns, out + (m - first) * p.rows + n, p.rows);
    }
  }
}

int run(const Kernels& kernels, const Problem& p, int threads) {
  const bool is_packed = !kernels.is_prepared || p.num_rows > kDirectRows;
  const int64_t panel = p.num_rows < kPanelRows ? p.num_rows : kPanelRows;
  char* packed = nullptr;
  if (is_packed) {
    packed = static_cast<char*>(malloc(panel * p.in_features * kernels.prepared_bytes + 64));
    if (!packed) return 1;
  }
  const int64_t out_features = p.block_rows * p.rows;
  const int64_t group = kGroupRows;
#pragma omp parallel num_threads(threads) if (threads > 1)
  for (int64_t start = 0; start < p.num_rows; start += panel) {
    const int64_t rows = p.num_rows - start < panel ? p.num_rows - start : panel;
    Input input{static_cast<const char*>(p.x) + start * p.x_stride * kernels.stored_bytes,
                false, p.x_stride, p.in_features, p.columns, kernels.tile_rows, rows,
                kernels.stored_bytes};
    if (is_packed) {
      input.start = packed;
      input.is_packed = true;
      input.bytes = kernels.prepared_bytes;
#pragma omp for schedule(static)
      for (int64_t m = 0; m < rows; m += kernels.tile_rows) {
        const int64_t tile = rows - m < kernels.tile_rows ? rows - m : kernels.tile_rows;
        pack_tile(kernels, p, start + m, tile,
                  packed + m * p.in_features * kernels.prepared_bytes);
      }
    }
    const int64_t groups = (rows + group - 1) / group;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < p.block_rows * groups; task++) {
      const int64_t block_row = task / groups;
      const int64_t first = task % groups * group;
      const int64_t last = first + group < rows ? first + group : rows;
      alignas(64) float sums[2][kMaxGroupRows * kMaxSide];
      for (int64_t i = 0; i < p.num_weights; i++) {
        sum_block_row(kernels, p, p.weights[i], input, block_row, first, last, sums[i]);
      }
      const int64_t n = block_row * p.rows;
      for (int64_t m = first; m < last; m++) {
        char* y = static_cast<char*>(p.y) + ((start + m) * out_features + n) * kernels.stored_bytes;
        const int64_t at = (m - first) * p.rows;
        if (p.num_weights == 2) {
          kernels.finish_swiglu(sums[0] + at, sums[1] + at, y, p.rows);
        } else {
          const char* bias = static_cast<const char*>(p.bias);
          kernels.finish(sums[0] + at, bias ? bias + n * kernels.stored_bytes : nullptr, y, p.rows);
        }
      }
    }
  }
  free(packed);
  return 0;
}

// Element types and instruction sets, as Python numbers them.
enum Element { kF32 = 0, kBF16 = 1, kF16 = 2 };
enum InstructionSet { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512BF16 = 3 };

bool find_kernels(int element, int instruction_set, Kernels* found) {
#if IS_X86
  if (instruction_set == kAvx512BF16) {
    if (element == kF32) *found = avx512_bf16::kernels<avx512_bf16::F32>();
    if (element == kBF16) *found = avx512_bf16::kernels<avx512_bf16::Dot>();
    if (element == kF16) *found = avx512_bf16::kernels<avx512_bf16::F16>();
    return true;
  }
  if (instruction_set == kAvx512) {
    if (element == kF32) *found = avx512::kernels<avx512::F32>();
    if (element == kBF16) *found = avx512::kernels<avx512::BF16>();
    if (element == kF16) *found = avx512::kernels<avx512::F16>();
    return true;
  }
  if (instruction_set == kAvx2) {
    if (element == kF32) *found = avx2::kernels<avx2::F32>();
    if (element == kBF16) *found = avx2::kernels<avx2::BF16>();
    if (element == kF16) *found = avx2::kernels<avx2::F16>();
    return true;
  }
#endif
  if (element == kF32) *found = portable::kernels<portable::F32>();
  if (element == kBF16) *found = portable::kernels<portable::BF16>();
  return element != kF16;
}

}  // namespace

extern "C" {

// The best instruction set of this processor.
EXPORT int llmprune_instruction_set() {
#if IS_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return kAvx512BF16;
  if (avx512) return kAvx512;
  if (avx2) return kAvx2;
#endif
  return kPortable;
}

EXPORT void llmprune_tune(int64_t panel, int64_t group, int64_t direct) {
  kPanelRows = panel; kGroupRows = group; kDirectRows = direct;
}

EXPORT int llmprune_linear(int element, int instruction_set, int threads, const void* x, int64_t x_stride,
                    int64_t num_rows, int64_t in_features, int64_t block_rows, int64_t rows,
                    int64_t columns, const void* values, const int32_t* row_pointer,
                    const int32_t* column, const void* bias, void* y) {
  Kernels kernels;
  if (!find_kernels(element, instruction_set, &kernels)) return 2;
  Problem p{x, x_stride, num_rows, in_features, block_rows, rows, columns,
            {{values, row_pointer, column}, {}}, 1, bias, y};
  return run(kernels, p, threads);
}

EXPORT int llmprune_linear_swiglu(int element, int instruction_set, int threads, const void* x,
                           int64_t x_stride, int64_t num_rows, int64_t in_features,
                           int64_t block_rows, int64_t rows, int64_t columns, const void* gate,
                           const int32_t* gate_row_pointer, const int32_t* gate_column,
                           const void* up, const int32_t* up_row_pointer, const int32_t* up_column,
                           void* y) {
  Kernels kernels;
  if (!find_kernels(element, instruction_set, &kernels)) return 2;
  Problem p{x, x_stride, num_rows, in_features, block_rows, rows, columns,
            {{gate, gate_row_pointer, gate_column}, {up, up_row_pointer, up_column}}, 2, nullptr,
            y};
  return run(kernels, p, threads);
}

}  // extern "C"
