// The kernels by the names that nvcc gave them: which one it is, whether its launch is that of its tile, and its run.
#include <regex>

#include "../kernels/epilogue.h"
#include "../kernels/expand_backward_emulated.h"
#include "../kernels/low_rank_conv_emulated.h"
#include "../kernels/low_rank_linear_emulated.h"
#include "../kernels/shrink_expand_emulated.h"
#include "machine.h"

namespace shrank::rehearsal {
namespace {

struct Shape {
  const unsigned (&grid)[3];
  const unsigned (&block)[3];
  std::size_t shared_bytes;
};

std::string expect(bool holds, const char* what) { return holds ? "" : what; }

std::string element(Dtype dtype) {
  switch (dtype) {
    case Dtype::bfloat16: return "shrank::arch::bfloat16";
    case Dtype::float16: return "shrank::arch::float16";
    case Dtype::float32: return "float";
    case Dtype::float64: return "double";
  }
  return "";
}

std::string wrong_block(const Shape& shape, int threads, int shared_bytes) {
  if (shape.block[0] != static_cast<unsigned>(threads) || shape.block[1] != 1 || shape.block[2] != 1)
    return "the block is not that of the tile";
  return expect(shape.shared_bytes == static_cast<std::size_t>(shared_bytes), "the shared memory is not the tile's");
}

std::string first_of(const emulator::Result& result) { return result.problems.empty() ? "" : result.problems.front(); }

Form form_of(const std::string& number) { return static_cast<Form>(std::stoi(number)); }

std::string run_linear(const std::smatch& name, const LowRankLinearParams& params, const Shape& shape) {
  const LinearTile tile{std::stoi(name[2]), std::stoi(name[3]), form_of(name[4])};
  if (name[1] != element(params.dtype)) return "the kernel is of another element type than the parameters";
  if (std::string wrong = wrong_block(shape, tile.threads(), tile.shared_bytes()); !wrong.empty()) return wrong;
  const LinearGrid grid{tile, shape.grid[0], static_cast<int>(shape.grid[1])};
  if (grid.blocks_m != (params.M + tile.block_m - 1) / tile.block_m) return "the grid does not cover the rows";
  return first_of(emulate_low_rank_linear(params, grid, {}));
}

std::string run_few_rows(const std::smatch& name, const ShrinkExpandParams& params, const Shape& shape) {
  const bool shrinks = name[1] == "Shrink";
  const ShrinkExpandTile tile{std::stoi(name[3]), form_of(name[4]), std::stoi(name[5])};
  if (name[2] != element(params.dtype)) return "the kernel is of another element type than the parameters";
  const FewRowsLaunch of(params, tile);
  const int threads = shrinks ? ShrinkExpandTile::kShrinkThreads : ShrinkExpandTile::kExpandThreads;
  if (std::string wrong = wrong_block(shape, threads, shrinks ? tile.shrink_bytes() : tile.expand_bytes(of.rank));
      !wrong.empty())
    return wrong;
  const int64_t blocks = shrinks ? of.shrink_blocks : of.expand_blocks;
  if (shape.grid[0] != blocks) return "the grid does not cover the rows of the factor";
  if (shape.grid[1] != tile.groups(params.M) * (shrinks ? of.splits : 1))
    return "the grid does not cover the rows of x";
  return first_of(shrinks ? emulate_shrink(params, tile, {}) : emulate_expand(params, tile, {}));
}

std::string run_backward(const std::smatch& name, const ExpandBackwardParams& params, const Shape& shape) {
  const LinearTile tile{std::stoi(name[2]), std::stoi(name[3]), form_of(name[4])};
  if (name[1] != element(params.dtype)) return "the kernel is of another element type than the parameters";
  if (std::string wrong = wrong_block(shape, tile.threads(), tile.expand_bytes()); !wrong.empty()) return wrong;
  const LinearGrid grid{tile, shape.grid[0], static_cast<int>(shape.grid[1])};
  if (grid.blocks_m != (params.M + tile.block_m - 1) / tile.block_m) return "the grid does not cover the rows";
  return first_of(emulate_expand_backward(params, grid, {}));
}

std::string run_conv(const std::smatch& name, const LowRankConvParams& params, const Shape& shape, bool depthwise) {
  const LinearTile of_h{std::stoi(name[name.size() - 2]), std::stoi(name[name.size() - 1])};
  const Gather gather = depthwise ? Gather::depthwise : static_cast<Gather>(std::stoi(name[2]));
  const ConvTile tile{gather, of_h};
  if (name[1] != element(params.dtype)) return "the kernel is of another element type than the parameters";
  if (std::string wrong = wrong_block(shape, of_h.threads(), tile.shared_bytes()); !wrong.empty()) return wrong;
  if (shape.grid[1] != static_cast<unsigned>(params.blocks_n * params.up_groups))
    return "the grid is not the problem's";
  const ConvGrid grid{tile, shape.grid[0], params.blocks_n};
  if (grid.blocks_m != (params.M + of_h.block_m - 1) / of_h.block_m) return "the grid does not cover the pixels";
  return first_of(emulate_low_rank_conv(params, grid, {}));
}

template <typename Params>
std::string run_epilogue(const std::smatch& name, const Params& params, const Shape& shape,
                         void (*run_on_host)(const Params&, const EpilogueTile&)) {
  if (name[1] != element(params.dtype) || std::stoi(name[3]) != static_cast<int>(params.activation))
    return "the kernel is of another element type or activation than the parameters";
  const EpilogueTile tile{std::stoi(name[2]), static_cast<int>(shape.block[0]), static_cast<int>(shape.block[1]),
                          shape.grid[0], shape.grid[1]};
  if (tile.threads_n * tile.threads_m != 256) return "the block has not 256 threads";
  if (int64_t{tile.vector} * tile.threads_n * tile.blocks_n < params.N) return "the grid does not cover the columns";
  if (params.N % tile.vector || (tile.vector > 1 && reinterpret_cast<uintptr_t>(params.z) % 16))
    return "a row does not begin at a multiple of 16 bytes";
  run_on_host(params, tile);
  return "";
}

}  // namespace

std::string run_kernel(const std::string& name, const void* params, const unsigned (&grid)[3],
                       const unsigned (&block)[3], std::size_t shared_bytes) {
  static const std::regex linear(R"(LowRankLinear<([\w:]+), (\d+), (\d+), (\d+)>)");
  static const std::regex conv(R"(LowRankConv<([\w:]+), \(shrank::Gather\)(\d+), (\d+), (\d+)>)");
  static const std::regex depthwise(R"(LowRankDepthwise<([\w:]+), (\d+), (\d+)>)");
  static const std::regex few_rows(R"((Shrink|Expand)<([\w:]+), (\d+), (\d+), (\d+)>)");
  static const std::regex backward(R"(ExpandBackward<([\w:]+), (\d+), (\d+), (\d+)>)");
  static const std::regex epilogue_backward(R"(EpilogueBackward<([\w:]+), (\d+), \(shrank::Activation\)(\d+)>)");
  static const std::regex epilogue(R"(Epilogue<([\w:]+), (\d+), \(shrank::Activation\)(\d+)>)");
  const Shape shape{grid, block, shared_bytes};
  std::smatch found;
  if (std::regex_search(name, found, linear))
    return run_linear(found, *static_cast<const LowRankLinearParams*>(params), shape);
  if (std::regex_search(name, found, conv))
    return run_conv(found, *static_cast<const LowRankConvParams*>(params), shape, false);
  if (std::regex_search(name, found, depthwise))
    return run_conv(found, *static_cast<const LowRankConvParams*>(params), shape, true);
  if (std::regex_search(name, found, epilogue))
    return run_epilogue(found, *static_cast<const EpilogueParams*>(params), shape, run_epilogue_on_host);
  if (std::regex_search(name, found, epilogue_backward))
    return run_epilogue(found, *static_cast<const EpilogueBackwardParams*>(params), shape,
                        run_epilogue_backward_on_host);
  if (std::regex_search(name, found, few_rows))
    return run_few_rows(found, *static_cast<const ShrinkExpandParams*>(params), shape);
  if (std::regex_search(name, found, backward))
    return run_backward(found, *static_cast<const ExpandBackwardParams*>(params), shape);
  return "no kernel of this name is rehearsed";
}

}  // namespace shrank::rehearsal
