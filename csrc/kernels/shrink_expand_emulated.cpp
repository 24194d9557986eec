#include "shrink_expand_emulated.h"

#include <stdexcept>

#include "../select/with_tile.h"
#include "shrink_expand.cuh"

namespace shrank {
namespace {

emulator::Index3 grid_of(int64_t blocks, int64_t groups) {
  return {static_cast<unsigned>(blocks), static_cast<unsigned>(groups), 1};
}

// Calls visit(element, tile) with types.
template <typename Visit>
void with_kernel(const ShrinkExpandParams& params, const ShrinkExpandTile& tile, const Visit& visit) {
  const auto with_element = [&](auto element) {
    if (!with_tile<kShrinkExpandTiles>(tile, [&](auto known) { visit(element, known); }))
      throw std::invalid_argument("no shrink and expand kernels have this tile");
  };
  if (params.dtype == Dtype::bfloat16) return with_element(arch::bfloat16{});
  if (params.dtype == Dtype::float16) return with_element(arch::float16{});
  throw std::invalid_argument("shrink and expand take float16 and bfloat16");
}

class Buffers {
 public:
  explicit Buffers(int width) : width_(width) {}

  void add(const char* name, const void* base, int64_t numbers, bool writable, bool awaited, int width = 0) {
    const std::size_t size = numbers * (width ? width : width_);
    if (base) all.push_back({name, base, size, writable, awaited});
  }

  std::vector<emulator::Buffer> all;

 private:
  int width_;
};

}  // namespace

emulator::Result emulate_shrink(const ShrinkExpandParams& p, const ShrinkExpandTile& tile,
                                const emulator::Options& options) {
  Buffers buffers(bytes(p.dtype));
  buffers.add("x", p.x, int64_t{p.M} * p.K, false, true);
  for (int i = 0; i < tile.parts(); i++) {
    const FewRowsPair& of = p.pair[i];
    buffers.add("down", of.down, int64_t{of.R} * p.K, false, true);
    buffers.add("sums", of.sums, int64_t{of.splits} * p.M * of.R, true, true, sizeof(float));
    buffers.add("h", of.splits == 1 ? of.h : nullptr, int64_t{p.M} * of.R, true, true);
  }
  const FewRowsLaunch of(p, tile);
  emulator::Result result;
  with_kernel(p, tile, [&](auto element, auto known) {
    result =
        emulator::launch<Shrink<decltype(element), known().tokens, number_of(known().shrink_form()), known().layers>>(
            "shrink", grid_of(of.shrink_blocks, tile.groups(p.M) * of.splits), p, buffers.all, options, true);
  });
  return result;
}

// up, bias and residual may be read at once: the kernel before has waited for all that may have written them.
emulator::Result emulate_expand(const ShrinkExpandParams& p, const ShrinkExpandTile& tile,
                                const emulator::Options& options) {
  Buffers buffers(bytes(p.dtype));
  for (int i = 0; i < tile.parts(); i++) {
    const FewRowsPair& of = p.pair[i];
    const int N = p.N[i / tile.pairs()];
    const int others = of.order ? N - of.R : N;
    buffers.add("up", of.up, int64_t{others} * of.R, false, false);
    buffers.add("bias", of.bias, others, false, false);
    buffers.add("pivot_bias", of.pivot_bias, of.R, false, false);
    buffers.add("order", of.order, N, false, false, sizeof(int32_t));
    buffers.add("sums", of.sums, int64_t{of.splits} * p.M * of.R, false, true, sizeof(float));
    buffers.add("h", of.h, int64_t{p.M} * of.R, of.splits > 1, true);
  }
  buffers.add("residual", p.residual, int64_t{p.M} * p.N[0], false, false);
  for (int i = 0; i < tile.layers; i++) buffers.add("y", p.y[i], int64_t{p.M} * p.N[i], true, true);
  const FewRowsLaunch of(p, tile);
  emulator::Result result;
  with_kernel(p, tile, [&](auto element, auto known) {
    result = emulator::launch<Expand<decltype(element), known().tokens, number_of(known().form), known().layers>>(
        "expand", grid_of(of.expand_blocks, tile.groups(p.M)), p, buffers.all, options, false,
        tile.expand_bytes(of.rank));
  });
  return result;
}

emulator::Result emulate_shrink_expand(const ShrinkExpandParams& params, const ShrinkExpandTile& tile,
                                       const emulator::Options& options) {
  emulator::Result both = emulate_shrink(params, tile, options);
  const emulator::Result expand = emulate_expand(params, tile, options);
  both.problems.insert(both.problems.end(), expand.problems.begin(), expand.problems.end());
  both.counts.multiply_adds += expand.counts.multiply_adds;
  both.counts.load_matrices += expand.counts.load_matrices;
  both.counts.bank_conflicts += expand.counts.bank_conflicts;
  both.counts.barriers += expand.counts.barriers;
  return both;
}

}  // namespace shrank
