// A few rows of x, at most kMaxFewRows: lanes along in_features.

// Where panels become as fast, with 16 lanes.
constexpr int64_t kMaxFewRows = 11;
constexpr int64_t kMaxPartColumns = 16;

// Threads take parts of block rows: those are few, and uneven shares of them make threads wait.
int64_t num_parts(const Kernels& kernels, const Problem& p) {
  return p.out_size() / kernels.part_columns;
}

// Sums of a part, that begins at output `at` of a block row, for all rows of x.
void sum_part(const Kernels& kernels, const Problem& p, const Weight& weight, int64_t block,
              int64_t at, const char* x, int64_t x_row, float* sums) {
  const int64_t begin = weight.pointer[block], columns = kernels.part_columns;
  const int64_t block_size = p.height * p.width;
  const TileCall call{weight.column + begin, weight.pointer[block + 1] - begin, block_size,
                      p.width, x_row, columns};
  const char* w = static_cast<const char*>(weight.values) +
                  (begin * block_size + at * p.width) * kernels.stored_bytes;
  for (int64_t m = 0; m < p.num_rows; m += kernels.tile_rows) {
    const int64_t rest = p.num_rows - m;
    const int64_t rows = rest < kernels.tile_rows ? rest : kernels.tile_rows;
    for (int64_t n = 0; n < columns; n += kernels.tile_columns[rows]) {
      kernels.tiles[rows](call, x + m * x_row * kernels.prepared_bytes,
                          w + n * p.width * kernels.stored_bytes, sums + m * columns + n);
    }
  }
}

void write_part(const Kernels& kernels, const Problem& p, int64_t part, const char* x,
                int64_t x_row) {
  alignas(64) float sums[2][kMaxFewRows * kMaxPartColumns];
  const int64_t columns = kernels.part_columns, n = part * columns;
  for (int64_t i = 0; i < p.num_weights; i++) {
    sum_part(kernels, p, p.weights[i], n / p.height, n % p.height, x, x_row, sums[i]);
  }
  for (int64_t m = 0; m < p.num_rows; m++) {
    write_row(kernels, p, n, columns, m, sums[0] + m * columns, sums[1] + m * columns);
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
  for (int64_t part = 0; part < num_parts(kernels, p); part++) {
    write_part(kernels, p, part, x, x_row);
  }
  free(prepared);
  return kDone;
}
