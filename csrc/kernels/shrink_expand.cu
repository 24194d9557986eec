#include "../select/with_tile.h"
#include "launch.cuh"
#include "shrink_expand.cuh"

namespace shrank {
namespace {

template <typename T>
void launch_tile(const ShrinkExpandParams& params, const ShrinkExpandTile& tile, bool dependent, void* stream) {
  const bool found = with_tile<kShrinkExpandTiles>(tile, [&](auto known) {
    constexpr int kTokens = known().tokens, kLayers = known().layers, kForm = number_of(known().form);
    constexpr int kShrinkForm = number_of(known().shrink_form());
    const FewRowsLaunch of(params, tile);
    const auto count = [](int64_t blocks) { return static_cast<unsigned>(blocks); };
    launch<Shrink<T, kTokens, kShrinkForm, kLayers>>(
        "shrink", dim3(count(of.shrink_blocks), count(tile.groups(params.M) * of.splits)), params, dependent, stream);
    launch<Expand<T, kTokens, kForm, kLayers>>("expand", dim3(count(of.expand_blocks), count(tile.groups(params.M))),
                                               params, dependent, stream, tile.expand_bytes(of.rank));
  });
  if (!found) throw std::runtime_error("shrank: shrink and expand were not compiled for the tile that select chose");
}

}  // namespace

void launch_shrink_expand(const ShrinkExpandParams& params, const ShrinkExpandTile& tile, bool dependent,
                          void* stream) {
  if (params.dtype == Dtype::bfloat16) return launch_tile<arch::bfloat16>(params, tile, dependent, stream);
  if (params.dtype == Dtype::float16) return launch_tile<arch::float16>(params, tile, dependent, stream);
  throw std::runtime_error("shrank: shrink and expand take float16 and bfloat16, not " +
                           std::string(name_of(params.dtype)));
}

}  // namespace shrank
