// What block_sparse.cpp asks of one instruction set, and with what.

// One block row, for a few rows of x.
struct TileCall {
  const int32_t* column;  // of each block
  int64_t count;          // blocks
  int64_t block_size;     // numbers of a block
  int64_t width;          // its columns
  int64_t x_row;          // from one row of x to the next
  int64_t out_row;        // and of the sums
};

// Some blocks of a block row, or of a block column, for a panel of rows of x.
struct PanelCall {
  const int32_t* column;  // block column, or block row, of each block
  const int32_t* place;   // its place in the values; only of a block column
  int64_t count;          // blocks
  int64_t left;           // these and all that follow
  bool is_first;          // sums are begun, not gone on with
  int64_t block_size;
  int64_t height, width;  // rows and columns of a block
};

// What one instruction set offers for one element type.
struct Kernels {
  int64_t stored_bytes, prepared_bytes;
  bool has_amx;      // products run on tiles of the processor
  bool is_prepared;  // a tile can read x as it is
  int64_t lanes;
  int64_t chain;  // numbers of a row that a panel sums up before it adds to what it has
  int64_t part_columns;  // outputs that a thread takes at one time, for a few rows
  int64_t tile_rows;
  int64_t tile_columns[kMaxTileRows + 1];
  void (*tiles[kMaxTileRows + 1])(const TileCall&, const void* x, const void* w, float* out);
  int64_t panel_columns[kMaxVectors + 1];
  void (*panels[2][kMaxVectors + 1])(const PanelCall&, const void* x, const void* w, float* out);
  void (*prepare)(const void* x, void* out, int64_t count);
  void (*pack_panel)(const void* x, int64_t x_stride, int64_t count, int64_t width,
                     int64_t vectors, void* out);
  void (*unpack_panel)(const float* in, int64_t vectors, int64_t rows, float* out);
  void (*finish)(const float* sums, const void* bias, void* y, int64_t count);
  void (*finish_swiglu)(const float* gate, const float* up, void* y, int64_t count);
};
