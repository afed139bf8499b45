// A gated MLP in one call: down(silu(x Wg^T) * (x Wu^T)), the products as they are on their own.
//
// What is between them is rounded to the element type, as it would be in a tensor, and additions
// have the order that they have without each other: the bits are those of two calls.

// Rows of x go through both products in rounds of about so many bytes between them.
constexpr int64_t kBetweenBytes = 1 << 20;
// Of rows that are packed together; more in a round would not change a bit, and neither would less.
constexpr int64_t kRoundRows = 48;

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
  const int64_t columns = kernels.tile_columns[1];
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(dynamic)
    for (int64_t part = 0; part < num_parts(kernels, opening); part++) {
      write_part(kernels, opening, part, x, x_row);
      for (int64_t m = 0; !kernels.is_prepared && m < rows; m++) {
        const int64_t at = m * down.in_size + part * columns;
        kernels.prepare(memory + at * kernels.stored_bytes,
                        const_cast<char*>(hidden) + at * kernels.prepared_bytes, columns);
      }
    }
#pragma omp for schedule(dynamic)
    for (int64_t part = 0; part < num_parts(kernels, down); part++) {
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
  const int64_t fitting = kBetweenBytes / row_bytes / kRoundRows * kRoundRows;
  const int64_t round = fitting < kRoundRows ? kRoundRows : fitting;
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
