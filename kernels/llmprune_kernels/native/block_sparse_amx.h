// Many rows of x in bfloat16 on tiles of the processor (AMX): y^T = W x^T, 16 outputs by 16 rows.
//
// A tile of the weight is 16 rows of a stored block, read where they are: nothing of a weight is
// packed or kept. x is packed once a call as for panels of one vector, which is the layout that the
// second operand of a tile product has: pairs of numbers of 16 rows. Sums are fp32, in the order of
// the blocks, whatever the threads and the other rows are.
//
// A compiler sees no memory that a tile is loaded from: a barrier is before the first.

namespace amx {

#define AMX_TARGET __attribute__((target("amx-tile,amx-bf16")))

constexpr int64_t kLanes = 16;     // outputs, or rows of x, of a tile
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
  float* sums = call.sums;
  _tile_stored(0, sums, 64);
  if constexpr (GROUPS == 2) _tile_stored(1, sums + call.sums_group, 64);
  if constexpr (OUTPUTS > 1) {
    _tile_stored(2, sums + 256, 64);
    if constexpr (GROUPS == 2) _tile_stored(3, sums + call.sums_group + 256, 64);
  }
  if constexpr (OUTPUTS == 4) {
    _tile_stored(1, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
  }
}

template <int OUTPUTS, int GROUPS>
void multiply_all(Call call, int64_t height) {
  for (int64_t n = 0; n < height; n += OUTPUTS * kLanes) {
    multiply<OUTPUTS, GROUPS>(call);
    call.weight += OUTPUTS * kLanes * call.width;
    call.sums += OUTPUTS * kLanes * kLanes;
  }
}

// One or two groups of rows of x times one block row.
void sum_groups(const Problem& p, const Weight& weight, int64_t block, int64_t groups,
                const uint32_t* x, int64_t group, float* sums) {
  const int64_t begin = weight.pointer[block], block_size = p.height * p.width;
  const Call call{static_cast<const uint16_t*>(weight.values) + begin * block_size,
                  weight.column + begin, weight.pointer[block + 1] - begin, block_size, p.width,
                  x, group, sums, kMaxSide * kLanes};
  if (groups == 2) {
    p.height == 16 ? multiply_all<1, 2>(call, p.height) : multiply_all<2, 2>(call, p.height);
  } else {
    p.height == 16   ? multiply_all<1, 1>(call, p.height)
    : p.height == 32 ? multiply_all<2, 1>(call, p.height)
                     : multiply_all<4, 1>(call, p.height);
  }
}

// Rows `first` to `first + rows` of x times one block row.
void write_groups(const Kernels& kernels, const Problem& p, int64_t block, int64_t first,
                  int64_t rows, const uint32_t* x, int64_t group) {
  alignas(64) float by_output[2][kPairGroups * kMaxSide * kLanes];
  alignas(64) float sums[2][kMaxSide * kLanes];
  configure(p.width);
  for (int64_t m = 0; m < rows; m += kPairGroups * kLanes) {
    const int64_t groups = rows - m > kLanes ? 2 : 1;
    for (int64_t i = 0; i < p.num_weights; i++) {
      sum_groups(p, p.weights[i], block, groups, x + m / kLanes * group, group, by_output[i]);
    }
    for (int64_t g = 0; g < groups; g++) {
      for (int64_t i = 0; i < p.num_weights; i++) {
        kernels.unpack_panel(by_output[i] + g * kMaxSide * kLanes, 1, p.height, sums[i]);
      }
      const int64_t at = m + g * kLanes;
      for (int64_t row = 0; row < kLanes && at + row < rows; row++) {
        write_row(kernels, p, block, first + at + row, sums[0] + row * p.height,
                  sums[1] + row * p.height);
      }
    }
  }
  release();
}

// Packed rows of x that are multiplied with one block row after another: half of a cache of 2 MiB.
constexpr int64_t kChunkBytes = 1 << 20;

Status run(const Kernels& kernels, const Problem& p, int threads) {
  // Packing writes whole squares of units: a row may end within one.
  const int64_t group = (p.in_size + 31) / 32 * 16 * kLanes;
  const int64_t groups = (p.num_rows + kLanes - 1) / kLanes;
  const int64_t fitting = kChunkBytes / (group * 4) / 2 * 2;
  const int64_t chunk = fitting < 2 ? 2 : fitting;
  const int64_t chunks = (groups + chunk - 1) / chunk;
  uint32_t* packed = static_cast<uint32_t*>(aligned_alloc(64, groups * group * 4));
  if (!packed) return kNoMemory;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t g = 0; g < groups; g++) {
      const int64_t m = g * kLanes;
      kernels.pack_panel(static_cast<const uint16_t*>(p.x) + m * p.x_stride, p.x_stride,
                         p.num_rows - m < kLanes ? p.num_rows - m : kLanes, p.in_size, 1,
                         packed + g * group);
    }
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < chunks * p.out_blocks; task++) {
      const int64_t first = task / p.out_blocks * chunk * kLanes;
      const int64_t rest = p.num_rows - first;
      write_groups(kernels, p, task % p.out_blocks, first,
                   rest < chunk * kLanes ? rest : chunk * kLanes,
                   packed + first / kLanes * group, group);
    }
  }
  free(packed);
  return kDone;
}

}  // namespace amx
