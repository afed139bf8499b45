// bfloat16 on tiles of the processor (AMX): y^T = W x^T, 16 outputs by 16 rows of x at a time.
//
// A tile of the weight is 16 rows of a stored block, read where they are: nothing of a weight is
// kept, so nothing can be out of date (x W needs transposed blocks, and makes them in each call).
// x is packed in each call as for panels of one vector, which is the layout that the second operand
// of a tile product has: pairs of numbers of 16 rows. Sums are fp32, in the order of the blocks,
// whatever the threads and the other rows are.
//
// A compiler does not see what memory a tile is loaded from: a barrier is before the first.

// Tiles need a system that saves them and a compiler that knows them.
#if defined(__clang__)
#define KNOWS_AMX (__clang_major__ >= 12)
#else
#define KNOWS_AMX (__GNUC__ >= 11)
#endif
#if IS_X86 && defined(__linux__) && KNOWS_AMX
#define HAS_AMX 1

namespace amx {

#define AMX_TARGET __attribute__((target("amx-tile,amx-bf16")))

constexpr int64_t kLanes = 16;  // outputs, or rows of x, of a tile
constexpr int64_t kTile = kLanes * kLanes;
constexpr int64_t kPairGroups = 2;  // groups of rows of x that are multiplied at one time

struct Call {
  const uint16_t* weight;   // the first of these outputs in the first block
  const int32_t* column;    // of each block
  int64_t count;            // blocks
  int64_t block_size;       // numbers of a block
  int64_t width;            // its columns
  const uint32_t* x;        // packed: [group][pair of numbers][row of x]
  int64_t group;            // from one group to the next
  float* sums;              // [group][output][row of x]
  int64_t sums_group;
};

// Whether tiles may be used: the processor has them, the system saves them and lets this process.
bool is_allowed() {
  unsigned a, b, c, d, saved, high;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool has_bf16 = d >> 22 & 1, has_tiles = d >> 24 & 1;
  if (!has_bf16 || !has_tiles) return false;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return false;
  const bool has_xgetbv = c >> 27 & 1;
  if (!has_xgetbv) return false;
  asm volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  constexpr unsigned kTileStates = 3u << 17;
  if ((saved & kTileStates) != kTileStates) return false;
  // ARCH_REQ_XCOMP_PERM, for XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}

struct Config {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// tmm0 to tmm3: sums; tmm4, tmm5: the weight; tmm6, tmm7: x.
AMX_TARGET void configure(int64_t width) {
  Config config;
  const int64_t taken = width < 32 ? width : 32;
  for (int i = 0; i < 8; i++) {
    config.rows[i] = i < 6 ? 16 : taken / 2;
    config.row_bytes[i] = i == 4 || i == 5 ? taken * 2 : 64;
  }
  asm volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

AMX_TARGET void release() { _tile_release(); }

// OUTPUTS x GROUPS tiles of sums.
template <int OUTPUTS, int GROUPS>
AMX_TARGET void multiply(const Call& call) {
  asm volatile("" : : : "memory");
  float *first = call.sums, *second = call.sums + call.sums_group;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const int64_t stride = call.width * 2, next = kLanes * call.width;
  const uint16_t* block = call.weight;
  for (int64_t j = 0; j < call.count; j++, block += call.block_size) {
    const uint32_t* x = call.x + call.column[j] * call.width / 2 * kLanes;
    for (int64_t k = 0; k < call.width; k += 32, x += 16 * kLanes) {
      const uint16_t* w = block + k;
      _tile_loadd(6, x, 64);
      _tile_loadd(4, w, stride);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (GROUPS == 2) {
        _tile_loadd(7, x + call.group, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (OUTPUTS > 1) {
        _tile_loadd(5, w + next, stride);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (GROUPS == 2) _tile_dpbf16ps(3, 5, 7);
      }
      if constexpr (OUTPUTS == 4) {
        _tile_loadd(4, w + 2 * next, stride);
        _tile_dpbf16ps(1, 4, 6);
        _tile_loadd(5, w + 3 * next, stride);
        _tile_dpbf16ps(3, 5, 6);
      }
    }
  }
  _tile_stored(0, first, 64);
  if constexpr (GROUPS == 2) _tile_stored(1, second, 64);
  if constexpr (OUTPUTS > 1) _tile_stored(2, first + kTile, 64);
  if constexpr (OUTPUTS > 1 && GROUPS == 2) _tile_stored(3, second + kTile, 64);
  if constexpr (OUTPUTS == 4) {
    _tile_stored(1, first + 2 * kTile, 64);
    _tile_stored(3, first + 3 * kTile, 64);
  }
}

template <int OUTPUTS, int GROUPS>
void multiply_all(Call call, int64_t height) {
  for (int64_t n = 0; n < height; n += OUTPUTS * kLanes) {
    multiply<OUTPUTS, GROUPS>(call);
    call.weight += OUTPUTS * kLanes * call.width;
    call.sums += OUTPUTS * kTile;
  }
}

// One or two groups of rows of x times one block row of `height` outputs.
void sum_groups(const Call& call, int64_t height, int64_t groups) {
  if (groups == 2) {
    height == 16 ? multiply_all<1, 2>(call, height) : multiply_all<2, 2>(call, height);
  } else {
    height == 16   ? multiply_all<1, 1>(call, height)
    : height == 32 ? multiply_all<2, 1>(call, height)
                   : multiply_all<4, 1>(call, height);
  }
}

// The blocks of one block row where they are, or of one block column, each transposed into `made`.
Call blocks_of(const Problem& p, const Weight& weight, int64_t block, uint16_t* made) {
  const int64_t begin = weight.pointer[block], count = weight.pointer[block + 1] - begin;
  const int64_t block_size = p.height * p.width;
  const uint16_t* values = static_cast<const uint16_t*>(weight.values);
  Call call{};
  call.weight = p.is_transposed ? made : values + begin * block_size;
  call.column = weight.column + begin;
  call.count = count;
  call.block_size = block_size;
  call.width = p.is_transposed ? p.height : p.width;
  call.sums_group = kMaxSide * kLanes;
  for (int64_t j = 0; p.is_transposed && j < count; j++) {
    avx512_bf16::transpose_block(values + weight.place[begin + j] * block_size, p.height, p.width,
                                 made + j * block_size);
  }
  return call;
}

// Asks for `rows` rows of y before they are written: they lie too far apart for a processor to see
// where the next one is.
__attribute__((target("prfchw"))) void fetch_rows(const uint16_t* y, int64_t y_row, int64_t rows,
                                                  int64_t count) {
  for (int64_t m = 0; m < rows; m++, y += y_row) {
    for (int64_t n = 0; n < count; n += 32) __builtin_prefetch(y + n, 1, 3);
  }
}

// `rows` rows of x, from row `first` on, times one block row, or block column.
void write_groups(const Problem& p, int64_t block, int64_t first, int64_t rows, const uint32_t* x,
                  int64_t group, uint16_t* made) {
  alignas(64) float sums[2][kPairGroups * kMaxSide * kLanes];
  const int64_t height = p.out_width(), y_row = p.out_blocks * height, n = block * height;
  const uint16_t* bias = static_cast<const uint16_t*>(p.bias);
  uint16_t* y = static_cast<uint16_t*>(p.y) + first * y_row + n;
  Call calls[2];
  for (int64_t i = 0; i < p.num_weights; i++) {
    calls[i] = blocks_of(p, p.weights[i], block, made);
    calls[i].group = group;
    calls[i].sums = sums[i];
  }
  configure(calls[0].width);
  for (int64_t m = 0; m < rows; m += kPairGroups * kLanes, y += kPairGroups * kLanes * y_row) {
    const int64_t left = rows - m;
    const int64_t groups = left > kLanes ? 2 : 1;
    fetch_rows(y, y_row, left < kPairGroups * kLanes ? left : kPairGroups * kLanes, height);
    for (int64_t i = 0; i < p.num_weights; i++) {
      calls[i].x = x + m / kLanes * group;
      sum_groups(calls[i], height, groups);
    }
    for (int64_t g = 0; g < groups; g++) {
      const int64_t place = g * kMaxSide * kLanes, rest = left - g * kLanes;
      avx512_bf16::write_tiles(sums[0] + place, p.num_weights == 2 ? sums[1] + place : nullptr,
                               bias ? bias + n : nullptr, height, rest < kLanes ? rest : kLanes,
                               y + g * kLanes * y_row, y_row);
    }
  }
  release();
}

int64_t thread_index() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Groups of 16 rows that are packed in one round and multiplied while they are in a cache of 2 MiB.
// Fewer read the weight more often, more leave the cache: 512 rows of 2048 numbers took a tenth
// longer with 8 or 32. Threads wait for one another twice a round.
constexpr int64_t kRoundGroups = 16;
// A weight that stays in that cache is read again for little, and y is written in fewer places at a
// time: 512 rows of 576 numbers times 1,536 outputs took a sixth less with 4 than with 16.
constexpr int64_t kSmallWeightBytes = 1 << 20, kSmallRoundGroups = 4;

int64_t round_groups(const Problem& p) {
  int64_t blocks = 0;
  for (int64_t i = 0; i < p.num_weights; i++) blocks += p.weights[i].pointer[p.out_blocks];
  const bool is_small = blocks * p.height * p.width * 2 <= kSmallWeightBytes;
  // x W makes its blocks once a round.
  return is_small && !p.is_transposed ? kSmallRoundGroups : kRoundGroups;
}

Status run(const Kernels& kernels, const Problem& p, int threads) {
  // Packing writes whole squares of units: a row may end within one.
  const int64_t group = (p.in_size + 31) / 32 * 16 * kLanes;
  const int64_t needed = (p.num_rows + kLanes - 1) / kLanes;
  const int64_t fitting = round_groups(p), groups = needed < fitting ? needed : fitting;
  int64_t most = 0;
  for (int64_t block = 0; p.is_transposed && block < p.out_blocks; block++) {
    const int64_t count = p.weights[0].pointer[block + 1] - p.weights[0].pointer[block];
    most = count > most ? count : most;
  }
  const int64_t packed_bytes = groups * group * 4, made_bytes = most * p.height * p.width * 2;
  char* memory = static_cast<char*>(aligned_alloc(64, packed_bytes + threads * made_bytes));
  if (!memory) return kNoMemory;
  uint32_t* packed = reinterpret_cast<uint32_t*>(memory);
#pragma omp parallel num_threads(threads) if (threads > 1)
  for (int64_t start = 0; start < p.num_rows; start += groups * kLanes) {
    const int64_t rest = p.num_rows - start;
    const int64_t rows = rest < groups * kLanes ? rest : groups * kLanes;
    void* made = memory + packed_bytes + thread_index() * made_bytes;
#pragma omp for schedule(static)
    for (int64_t m = 0; m < rows; m += kLanes) {
      kernels.pack_panel(static_cast<const uint16_t*>(p.x) + (start + m) * p.x_stride, p.x_stride,
                         rows - m < kLanes ? rows - m : kLanes, p.in_size, 1,
                         packed + m / kLanes * group);
    }
#pragma omp for schedule(dynamic)
    for (int64_t block = 0; block < p.out_blocks; block++) {
      write_groups(p, block, start, rows, packed, group, static_cast<uint16_t*>(made));
    }
  }
  free(memory);
  return kDone;
}

}  // namespace amx

#else
#define HAS_AMX 0
#endif
