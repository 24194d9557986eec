// The kernels' own code, thread after thread: what C++ programs run on a CPU, and how tests see the kernels' indexing.
#include "epilogue.cuh"

namespace shrank {
namespace {

template <template <typename, int, Activation> class Kernel, typename Params>
void run_on_host(const Params& params, const EpilogueTile& tile) {
  const int64_t columns = tile.blocks_n * tile.threads_n, rows = tile.blocks_m * tile.threads_m;
  with_epilogue<Kernel>(params, tile, [&](auto kernel) {
    for (int64_t row = 0; row < rows; row++)
      for (int64_t column = 0; column < columns; column++) kernel.run(params, {column, row, columns, rows});
  });
}

}  // namespace

void run_epilogue_on_host(const EpilogueParams& params, const EpilogueTile& tile) {
  run_on_host<Epilogue>(params, tile);
}

void run_epilogue_backward_on_host(const EpilogueBackwardParams& params, const EpilogueTile& tile) {
  run_on_host<EpilogueBackward>(params, tile);
}

}  // namespace shrank
