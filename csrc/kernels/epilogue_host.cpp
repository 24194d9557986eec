// The kernel's own code, thread after thread: what C++ programs run on a CPU, and how tests see the kernel's indexing.
#include "epilogue.cuh"

namespace shrank {

void run_epilogue_on_host(const EpilogueParams& params, const EpilogueTile& tile) {
  const int64_t columns = tile.blocks_n * tile.threads_n, rows = tile.blocks_m * tile.threads_m;
  with_epilogue(params, tile, [&](auto kernel) {
    for (int64_t row = 0; row < rows; row++)
      for (int64_t column = 0; column < columns; column++) kernel.run(params, {column, row, columns, rows});
  });
}

}  // namespace shrank
