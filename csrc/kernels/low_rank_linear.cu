#include "low_rank_linear_launch.cuh"

namespace shrank {

void launch_low_rank_linear(const LowRankLinearParams& params, const LinearGrid& grid, bool dependent, void* stream) {
  if (params.M == 0 || params.N == 0) return;
  const auto launch = [&](auto element) {
    using T = decltype(element);
    switch (grid.tile.form) {
      case Form::plain: return launch_linear<T, kLinearTiles>(params, grid, dependent, stream);
      case Form::gated: return launch_linear<T, kGatedTiles>(params, grid, dependent, stream);
      case Form::pivoted: return launch_linear<T, kPivotedTiles>(params, grid, dependent, stream);
      case Form::gated_pivoted: break;
    }
    throw std::runtime_error("shrank: low_rank_linear takes gate and value with all rows of up");
  };
  if (params.dtype == Dtype::bfloat16) return launch(arch::bfloat16{});
  if (params.dtype == Dtype::float16) return launch(arch::float16{});
  throw std::runtime_error("shrank: low_rank_linear takes float16 and bfloat16, not " +
                           std::string(name_of(params.dtype)));
}

}  // namespace shrank
