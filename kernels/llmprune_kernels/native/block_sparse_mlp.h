// A gated MLP in one call: down(silu(x Wg^T) * (x Wu^T)), the products as they are on their own.
//
// What is between them is rounded to the element type, as it would be in a tensor, and additions
// have the order that they have without each other: the bits are those of two calls.

// Rows of x go through both products in rounds, with about so many bytes between them for each
// thread: more would leave a core's cache, less give threads too little to share. One thread of an
// AMD EPYC took 0.94 of the time of two calls for 512 and 2048 rows of SmolLM2-135M (576 and 1536
// numbers, half of the blocks, float32), with 256 KiB and 2 MiB as well.
constexpr int64_t kBetweenBytes = 1 << 20;
// Whole panels, and rounds of tiles of the processor, in a round: bits do not depend on it.
constexpr int64_t kPanelRows = 48, kTileRoundRows = 256;

struct Mlp {
  Problem opening;  // writes what is between
  Problem down;     // reads it
};

// One region of threads for both products: starting one costs as much as a small product.
Status run_mlp_tiles(const Kernels& kernels, const Mlp& mlp, int threads) {
  const Problem& p = mlp.opening;
  Problem opening = p, down = mlp.down;
  const int64_t rows = p.num_rows, between = rows * down.in_size * kernels.stored_bytes;
  const int64_t prepared_x = kernels.is_prepared ? 0 : rows * p.in_size * kernels.prepared_bytes;
  const int64_t prepared =
      kernels.is_prepared ? 0 : rows * down.in_size * kernels.prepared_bytes;
  char* memory = static_cast<char*>(malloc(between + prepared_x + prepared));
  if (!memory) return kNoMemory;
  opening.y = memory;
  const char *x = static_cast<const char*>(p.x), *hidden = memory;
  int64_t x_row = p.x_stride;
  if (!kernels.is_prepared) {
    prepare_rows(kernels, p, memory + between);
    x = memory + between;
    x_row = p.in_size;
    hidden = memory + between + prepared_x;
  }
  const int64_t height = part_height(opening);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(dynamic)
    for (int64_t part = 0; part < num_parts(opening); part++) {
      write_part(kernels, opening, part, x, x_row);
      for (int64_t m = 0; !kernels.is_prepared && m < rows; m++) {
        const int64_t at = m * down.in_size + part * height;
        kernels.prepare(memory + at * kernels.stored_bytes,
                        const_cast<char*>(hidden) + at * kernels.prepared_bytes, height);
      }
    }
#pragma omp for schedule(dynamic)
    for (int64_t part = 0; part < num_parts(down); part++) {
      write_part(kernels, down, part, hidden, down.in_size);
    }
  }
  free(memory);
  return kDone;
}

Status run_mlp(const Kernels& kernels, const Mlp& mlp, int threads) {
  const int64_t num_rows = mlp.opening.num_rows;
  const bool is_few = num_rows <= kMaxFewRows && num_rows < kernels.lanes;
  if (is_few && !kernels.has_amx) return run_mlp_tiles(kernels, mlp, threads);
  const int64_t row_bytes = mlp.down.in_size * kernels.stored_bytes;
  const int64_t unit = kernels.has_amx ? kTileRoundRows : kPanelRows;
  const int64_t fitting = threads * kBetweenBytes / row_bytes / unit * unit;
  const int64_t round = fitting < unit ? unit : fitting;
  void* between = malloc((num_rows < round ? num_rows : round) * row_bytes);
  if (!between) return kNoMemory;
  Status status = kDone;
  for (int64_t start = 0; start < num_rows && status == kDone; start += round) {
    Problem opening = mlp.opening, down = mlp.down;
    opening.num_rows = down.num_rows = num_rows - start < round ? num_rows - start : round;
    opening.x = static_cast<const char*>(opening.x) +
                start * opening.x_stride * kernels.stored_bytes;
    down.y = static_cast<char*>(down.y) + start * down.out_size() * kernels.stored_bytes;
    opening.y = between;
    down.x = between;
    status = run(kernels, opening, threads);
    if (status == kDone) status = run(kernels, down, threads);
  }
  free(between);
  return status;
}
