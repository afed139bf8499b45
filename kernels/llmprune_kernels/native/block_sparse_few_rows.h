// A few rows of x, at most kMaxFewRows: lanes along in_features.

// Where panels become as fast, with 16 lanes.
constexpr int64_t kMaxFewRows = 11;

// Outputs that a thread takes at once. Block rows are few, and uneven shares of them make threads
// wait; but one or two rows of x are multiplied in the time that reading the weight takes, and that
// is least where whole blocks are read from end to end.
int64_t part_height(const Problem& p) {
  return p.num_rows <= kMaxStreamRows ? p.height : kMaxLanes;
}

int64_t num_parts(const Problem& p) { return p.out_size() / part_height(p); }

// Sums of a part, that begins at output `at` of a block row, for all rows of x.
void sum_part(const Kernels& kernels, const Problem& p, const Weight& weight, int64_t block,
              int64_t at, const char* x, int64_t x_row, float* sums) {
  const int64_t begin = weight.pointer[block];
  const int64_t block_size = p.height * p.width, height = part_height(p);
  const TileCall call{weight.column + begin, weight.pointer[block + 1] - begin, block_size,
                      height, p.width, x_row, height};
  const char* w = static_cast<const char*>(weight.values) +
                  (begin * block_size + at * p.width) * kernels.stored_bytes;
  if (p.num_rows <= kMaxStreamRows) {
    kernels.streams[p.num_rows](call, x, w, sums);
    return;
  }
  for (int64_t m = 0; m < p.num_rows; m += kernels.tile_rows) {
    const int64_t rest = p.num_rows - m;
    const int64_t rows = rest < kernels.tile_rows ? rest : kernels.tile_rows;
    for (int64_t n = 0; n < height; n += kTileColumns) {
      kernels.tiles[rows](call, x + m * x_row * kernels.prepared_bytes,
                          w + n * p.width * kernels.stored_bytes, sums + m * height + n);
    }
  }
}

void write_part(const Kernels& kernels, const Problem& p, int64_t part, const char* x,
                int64_t x_row) {
  constexpr int64_t kStreamed = kMaxStreamRows * kMaxSide, kTiled = kMaxFewRows * kMaxLanes;
  alignas(64) float sums[2][kStreamed > kTiled ? kStreamed : kTiled];
  const int64_t height = part_height(p), n = part * height;
  for (int64_t i = 0; i < p.num_weights; i++) {
    sum_part(kernels, p, p.weights[i], n / p.height, n % p.height, x, x_row, sums[i]);
  }
  for (int64_t m = 0; m < p.num_rows; m++) {
    write_row(kernels, p, n, height, m, sums[0] + m * height, sums[1] + m * height);
  }
}

// What tiles read of x: a row is `width` numbers.
void prepare_rows(const Kernels& kernels, const Problem& p, char* prepared) {
  for (int64_t m = 0; m < p.num_rows; m++) {
    kernels.prepare(static_cast<const char*>(p.x) + m * p.x_stride * kernels.stored_bytes,
                    prepared + m * p.in_size * kernels.prepared_bytes, p.in_size);
  }
}

Status run_tiles(const Kernels& kernels, const Problem& p, int threads) {
  const char* x = static_cast<const char*>(p.x);
  int64_t x_row = p.x_stride;
  char* prepared = nullptr;
  if (!kernels.is_prepared) {
    prepared = static_cast<char*>(malloc(p.num_rows * p.in_size * kernels.prepared_bytes));
    if (!prepared) return kNoMemory;
    prepare_rows(kernels, p, prepared);
    x = prepared;
    x_row = p.in_size;
  }
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int64_t part = 0; part < num_parts(p); part++) {
    write_part(kernels, p, part, x, x_row);
  }
  free(prepared);
  return kDone;
}
