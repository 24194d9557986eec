#include "../select/with_tile.h"
#include "launch.cuh"
#include "shrink_expand.cuh"

namespace shrank {
namespace {

template <typename T>
void launch_tile(const ShrinkExpandParams& params, const ShrinkExpandTile& tile, bool dependent, void* stream) {
  const bool found = with_tile<kShrinkExpandTiles>(tile, [&](auto known) {
    constexpr int kTokens = known().tokens, kPairs = known().pairs;
    const auto groups = static_cast<unsigned>(tile.groups(params.M)), splits = static_cast<unsigned>(params.splits);
    launch<Shrink<T, kTokens, kPairs>>(
        "shrink", dim3(static_cast<unsigned>(shrink_blocks(params, tile)), groups * splits), params, dependent, stream);
    launch<Expand<T, kTokens, kPairs>>("expand",
                                       dim3(static_cast<unsigned>(ShrinkExpandTile::expand_blocks(params.N)), groups),
                                       params, dependent, stream, tile.expand_bytes(most_rank(params, tile)));
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
