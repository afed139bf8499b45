// Products with a weight stored in blocks, on a CPU: one C function for each.
//
// Plain C interface and no header of PyTorch: it builds in seconds and one build serves every
// version of PyTorch. Threads are OpenMP's, so they are those that PyTorch itself uses.
// The instruction set is chosen when a function is called, never when it is compiled.

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(_OPENMP)
#include <omp.h>
#endif

#if defined(__x86_64__)
#define IS_X86 1
#include <cpuid.h>
#include <immintrin.h>
#else
#define IS_X86 0
#endif

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define EXPORT __attribute__((visibility("default")))

namespace {

constexpr int kMaxStreamRows = 2;
constexpr int kMaxTileRows = 6;
constexpr int kTileColumns = 4;
constexpr int kMaxVectors = 3;
constexpr int kMaxLanes = 16;
constexpr int kMaxSide = 128;

#include "block_sparse_calls.h"

#define ISA portable
#define ISA_TARGET
#define VECTOR_BYTES 16
#define ISA_REGISTERS 16
#define ISA_F16 0
#define ISA_DOT 0
#include "block_sparse_tiles.h"

#if IS_X86
#define ISA avx2
#define ISA_TARGET __attribute__((target("avx2,fma,f16c")))
#define VECTOR_BYTES 32
#define ISA_REGISTERS 16
#define ISA_F16 1
#define ISA_DOT 0
#include "block_sparse_tiles.h"

#define ISA avx512
#define ISA_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))
#define VECTOR_BYTES 64
#define ISA_REGISTERS 32
#define ISA_F16 1
#define ISA_DOT 0
#include "block_sparse_tiles.h"

#define ISA avx512_bf16
#define ISA_TARGET \
  __attribute__((target("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))
#define VECTOR_BYTES 64
#define ISA_REGISTERS 32
#define ISA_F16 1
#define ISA_DOT 1
#include "block_sparse_tiles.h"
#endif

// Element types and instruction sets, as Python numbers them.
enum Element { kF32 = 0, kBF16 = 1, kF16 = 2 };
enum InstructionSet { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512BF16 = 3, kAmx = 4 };
enum Status { kDone = 0, kNoMemory = 1, kNotSupported = 2 };

// Blocks of one weight by block row, or by block column.
struct Weight {
  const void* values;
  const int32_t* pointer;
  const int32_t* column;
  const int32_t* place;
};

struct Problem {
  const void* x;
  int64_t x_stride, num_rows;
  int64_t in_size;         // numbers of a row of x
  int64_t out_blocks;      // block rows, or block columns, of the result
  int64_t height, width;   // rows and columns of a block
  bool is_transposed;      // x W instead of x W^T
  Weight weights[2];
  int64_t num_weights;     // 2: silu(x W0^T) * (x W1^T)
  const void* bias;
  void* y;

  int64_t out_width() const { return is_transposed ? width : height; }
  int64_t out_size() const { return out_blocks * out_width(); }  // numbers of a row of y
};

// `count` outputs of row m of y, from output n on.
void write_row(const Kernels& kernels, const Problem& p, int64_t n, int64_t count, int64_t m,
               const float* sums, const float* up) {
  char* y = static_cast<char*>(p.y) + (m * p.out_size() + n) * kernels.stored_bytes;
  if (p.num_weights == 2) {
    kernels.finish_swiglu(sums, up, y, count);
  } else {
    const char* bias = static_cast<const char*>(p.bias);
    kernels.finish(sums, bias ? bias + n * kernels.stored_bytes : nullptr, y, count);
  }
}

#include "block_sparse_few_rows.h"

void sum_panel(const Kernels& kernels, const Problem& p, const Weight& weight, int64_t block,
               const void* x, int64_t vectors, float* sums) {
  alignas(64) float by_column[kMaxSide * kMaxVectors * kMaxLanes];
  const int64_t begin = weight.pointer[block];
  const int64_t count = weight.pointer[block + 1] - begin;
  const int64_t block_size = p.height * p.width;
  const char* w = static_cast<const char*>(weight.values);
  if (!p.is_transposed) w += begin * block_size * kernels.stored_bytes;
  const int64_t columns = kernels.panel_columns[vectors];
  // All outputs of one chain of blocks before the next chain: what they read of x stays in the
  // nearest cache. One vector of rows stays there anyway.
  const int64_t depth = p.is_transposed ? p.height : p.width;
  const int64_t chain = kernels.chain / depth + (kernels.chain % depth != 0);
  const int64_t step = vectors == 1 || chain > count ? count : chain;
  int64_t j = 0;
  do {
    const int64_t left = count - j;
    const PanelCall call{weight.column + begin + j,
                         p.is_transposed ? weight.place + begin + j : nullptr,
                         left < step ? left : step, left, j == 0, block_size, p.height, p.width};
    for (int64_t n = 0; n < p.out_width(); n += columns) {
      const int64_t at = p.is_transposed ? n : n * p.width + j * block_size;
      kernels.panels[p.is_transposed][vectors](call, x, w + at * kernels.stored_bytes,
                                               by_column + n * vectors * kernels.lanes);
    }
    j += step;
  } while (j < count);
  kernels.unpack_panel(by_column, vectors, p.out_width(), sums);
}

void write_panel(const Kernels& kernels, const Problem& p, int64_t block, int64_t first,
                 int64_t rows, int64_t vectors, const void* packed) {
  alignas(64) float sums[2][kMaxSide * kMaxVectors * kMaxLanes];
  for (int64_t i = 0; i < p.num_weights; i++) {
    sum_panel(kernels, p, p.weights[i], block, packed, vectors, sums[i]);
  }
  for (int64_t m = 0; m < rows; m++) {
    const int64_t at = m * p.out_width();
    write_row(kernels, p, block * p.out_width(), p.out_width(), first + m, sums[0] + at,
              sums[1] + at);
  }
}

// x is packed in rounds of at most this many bytes: threads wait for one another twice a round.
constexpr int64_t kRoundBytes = 16 << 20;

// Many rows of x: lanes are rows.
Status run_panels(const Kernels& kernels, const Problem& p, int threads) {
  const int64_t lanes = kernels.lanes;
  const int64_t needed = (p.num_rows + lanes - 1) / lanes;
  const int64_t panel = (needed < kMaxVectors ? needed : kMaxVectors) * lanes;
  // Packing writes whole squares of units: a row may end within one.
  const int64_t units = (p.in_size + 2 * lanes - 1) / (2 * lanes) * (2 * lanes);
  const int64_t fitting = kRoundBytes / (units * panel * 4);
  const int64_t wanted = (p.num_rows + panel - 1) / panel;
  const int64_t panels = fitting < 1 ? 1 : fitting < wanted ? fitting : wanted;
  float* packed =
      static_cast<float*>(aligned_alloc(64, (panels * units * panel * 4 + 63) / 64 * 64));
  if (!packed) return kNoMemory;
#pragma omp parallel num_threads(threads) if (threads > 1)
  for (int64_t start = 0; start < p.num_rows; start += panels * panel) {
    const int64_t rest = p.num_rows - start;
    const int64_t rows = rest < panels * panel ? rest : panels * panel;
    // Rows of x, and vectors of them, in the panel that begins at row m of this round.
    const auto rows_at = [=](int64_t m) { return rows - m < panel ? rows - m : panel; };
    const auto vectors_at = [=](int64_t m) { return (rows_at(m) + lanes - 1) / lanes; };
#pragma omp for schedule(static)
    for (int64_t m = 0; m < rows; m += lanes) {
      const int64_t first = m / panel * panel;
      kernels.pack_panel(
          static_cast<const char*>(p.x) + (start + m) * p.x_stride * kernels.stored_bytes,
          p.x_stride, rows - m < lanes ? rows - m : lanes, p.in_size, vectors_at(first),
          packed + first * units + (m - first));
    }
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < (rows + panel - 1) / panel * p.out_blocks; task++) {
      const int64_t first = task / p.out_blocks * panel;
      write_panel(kernels, p, task % p.out_blocks, start + first, rows_at(first),
                  vectors_at(first), packed + first * units);
    }
  }
  free(packed);
  return kDone;
}

#include "block_sparse_amx.h"

// Whole vectors of rows as panels; a few that are left over as tiles.
Status run(const Kernels& kernels, const Problem& p, int threads) {
#if HAS_AMX
  if (kernels.has_amx) return amx::run(kernels, p, threads);
#endif
  const int64_t few = p.is_transposed ? 0 : kMaxFewRows;
  const int64_t rest = p.num_rows % kernels.lanes;
  if (rest == 0 || rest > few) return run_panels(kernels, p, threads);
  Problem many = p, left = p;
  many.num_rows = p.num_rows - rest;
  left.num_rows = rest;
  left.x = static_cast<const char*>(p.x) + many.num_rows * p.x_stride * kernels.stored_bytes;
  left.y = static_cast<char*>(p.y) + many.num_rows * p.out_size() * kernels.stored_bytes;
  const Status status = many.num_rows ? run_panels(kernels, many, threads) : kDone;
  return status == kDone ? run_tiles(kernels, left, threads) : status;
}

#include "block_sparse_mlp.h"

bool find_kernels(int element, int instruction_set, Kernels* found) {
#if IS_X86
  if (instruction_set == kAvx512BF16 || instruction_set == kAmx) {
    if (element == kF32) *found = avx512_bf16::kernels<avx512_bf16::F32>();
    if (element == kBF16) *found = avx512_bf16::kernels<avx512_bf16::Dot>();
    if (element == kF16) *found = avx512_bf16::kernels<avx512_bf16::F16>();
    found->has_amx = element == kBF16 && instruction_set == kAmx;
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
  if (avx512 && __builtin_cpu_supports("avx512bf16")) {
#if HAS_AMX
    if (amx::is_allowed()) return kAmx;
#endif
    return kAvx512BF16;
  }
  if (avx512) return kAvx512;
  if (avx2) return kAvx2;
#endif
  return kPortable;
}

// x W^T + bias; `bias` may be null. x has unit stride along in_features, y is contiguous.
EXPORT int llmprune_linear(int element, int instruction_set, int threads, const void* x,
                           int64_t x_stride, int64_t num_rows, int64_t in_features,
                           int64_t block_rows, int64_t height, int64_t width, const void* values,
                           const int32_t* row_pointer, const int32_t* column, const void* bias,
                           void* y) {
  Kernels kernels;
  if (!find_kernels(element, instruction_set, &kernels)) return kNotSupported;
  const Problem problem{x, x_stride, num_rows, in_features, block_rows, height, width, false,
                        {{values, row_pointer, column, nullptr}, {}}, 1, bias, y};
  return run(kernels, problem, threads);
}

// silu(x Wg^T) * (x Wu^T), both weights of one shape in blocks of one shape.
EXPORT int llmprune_linear_swiglu(int element, int instruction_set, int threads, const void* x,
                                  int64_t x_stride, int64_t num_rows, int64_t in_features,
                                  int64_t block_rows, int64_t height, int64_t width,
                                  const void* gate, const int32_t* gate_row_pointer,
                                  const int32_t* gate_column, const void* up,
                                  const int32_t* up_row_pointer, const int32_t* up_column,
                                  void* y) {
  Kernels kernels;
  if (!find_kernels(element, instruction_set, &kernels)) return kNotSupported;
  const Problem problem{x, x_stride, num_rows, in_features, block_rows, height, width, false,
                        {{gate, gate_row_pointer, gate_column, nullptr},
                         {up, up_row_pointer, up_column, nullptr}},
                        2, nullptr, y};
  return run(kernels, problem, threads);
}

// silu(x Wg^T) * (x Wu^T) as above, times Wd^T, whose blocks may have another shape; `bias` may be
// null.
EXPORT int llmprune_gated_mlp(int element, int instruction_set, int threads, const void* x,
                              int64_t x_stride, int64_t num_rows, int64_t in_features,
                              int64_t block_rows, int64_t height, int64_t width, const void* gate,
                              const int32_t* gate_row_pointer, const int32_t* gate_column,
                              const void* up, const int32_t* up_row_pointer,
                              const int32_t* up_column, int64_t down_block_rows,
                              int64_t down_height, int64_t down_width, const void* down,
                              const int32_t* down_row_pointer, const int32_t* down_column,
                              const void* bias, void* y) {
  Kernels kernels;
  if (!find_kernels(element, instruction_set, &kernels)) return kNotSupported;
  const int64_t between = block_rows * height;
  const Mlp mlp{{x, x_stride, num_rows, in_features, block_rows, height, width, false,
                 {{gate, gate_row_pointer, gate_column, nullptr},
                  {up, up_row_pointer, up_column, nullptr}},
                 2, nullptr, nullptr},
                {nullptr, between, num_rows, between, down_block_rows, down_height, down_width,
                 false, {{down, down_row_pointer, down_column, nullptr}, {}}, 1, bias, y}};
  return run_mlp(kernels, mlp, threads);
}

// dy W, through the blocks ordered by column.
EXPORT int llmprune_grad_input(int element, int instruction_set, int threads, const void* dy,
                               int64_t dy_stride, int64_t num_rows, int64_t out_features,
                               int64_t block_columns, int64_t height, int64_t width,
                               const void* values, const int32_t* column_pointer,
                               const int32_t* row, const int32_t* place, void* dx) {
  Kernels kernels;
  if (!find_kernels(element, instruction_set, &kernels)) return kNotSupported;
  const Problem problem{dy, dy_stride, num_rows, out_features, block_columns, height, width, true,
                        {{values, column_pointer, row, place}, {}}, 1, nullptr, dx};
  return run(kernels, problem, threads);
}

}  // extern "C"
